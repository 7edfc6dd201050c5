"""Charts of the reports: every line and label is seen."""

import re
from itertools import pairwise

from sdxl_core.report.charts import WIDTH, line_chart

RATES = [(0.0, 0.0), (10.0, 1e-5), (40.0, 1e-5)]


def test_lines_that_lie_on_each_other_are_all_seen() -> None:
    chart = line_chart({"unet": RATES, "te1": RATES, "te2": RATES}, x_label="step", y_label="rate")
    dashes = [re.search(r'dasharray="\d+ (\d+)"', line) for line in re.findall("<polyline.*?/>", chart)]
    gaps = [int(found[1]) if found else 0 for found in dashes]
    assert gaps == sorted(set(gaps)) and len(gaps) == 3, "each line has wider gaps than the one below it"


def test_the_legend_and_the_last_number_stay_within_the_chart() -> None:
    names = [f"a rather long name of a line, number {number}" for number in range(4)]
    chart = line_chart({name: [(0.0, 1.0), (0.00015, 2.0)] for name in names}, x_label="hours", y_label="rate")
    texts = [(float(x), rest, text) for x, rest, text in re.findall(r'<text x="([\d.]+)"([^>]*)>(.*?)<', chart)]
    labels = [(x, text) for x, _, text in texts if text.startswith("a rather")]
    assert len(labels) == 4 and all(x + 7 * len(text) < right for (x, text), (right, _) in pairwise(labels))
    numbers = [(x, text) for x, rest, text in texts if "middle" in rest]
    assert len(numbers) > 3 and all(x + 3.5 * len(text) <= WIDTH for x, text in numbers)


def test_a_single_value_is_a_dot() -> None:
    assert "<circle" in line_chart({"speed": [(1.0, 2.0)]}, x_label="seconds", y_label="pictures a second")
    assert "<circle" not in line_chart({"speed": RATES}, x_label="seconds", y_label="pictures a second")
