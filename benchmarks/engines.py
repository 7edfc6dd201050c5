"""What a shard costs beside its work, by engine: processes of this machine, a local Ray, a Ray cluster of two nodes.

    python benchmarks/engines.py --out benchmarks/engines.md

Imports nothing by itself: a spawned slot imports this file again.
"""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from engine_overheads import report

    text = "\n".join(report(options.rounds)) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
