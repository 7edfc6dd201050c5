"""Counts pictures that a VAE begins to encode and steps that a trainer begins. With this folder on PYTHONPATH and

CHAOS_COUNT=FILE, every process appends "encode N PID" or "step 1 PID" to the file as its work begins: work that a kill
throws away is counted too. Read by benchmarks/chaos.py.
"""

import importlib.abc
import importlib.machinery
import os
import sys


def count(word, number):
    file = os.open(os.environ["CHAOS_COUNT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{word} {number} {os.getpid()}\n".encode())
    os.close(file)


def count_encoding(module):
    load = module.load_encoder

    def load_counted(vae, dtype, device):
        encode = load(vae, dtype, device)

        def counted(pixels):
            count("encode", len(pixels))
            return encode(pixels)

        return counted

    module.load_encoder = load_counted


def count_steps(module):
    step = module.Stepper.step

    def counted(*args):
        count("step", 1)
        return step(*args)

    module.Stepper.step = counted


COUNTED = {"sdxl_core.latents.vae": count_encoding, "sdxl_core.training.stepping": count_steps}


class Counting(importlib.abc.MetaPathFinder):
    """Puts a counter around one function of a module when that is imported."""

    def find_spec(self, name, path, target=None):
        if name not in COUNTED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            COUNTED[name](module)

        spec.loader.exec_module = exec_module
        return spec


if "CHAOS_COUNT" in os.environ:
    sys.meta_path.insert(0, Counting())
