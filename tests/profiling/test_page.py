"""The page of memkernels.profile: what it draws, and what a browser shows under the pointer."""

import html
import json
import re
import shutil
import subprocess
from itertools import pairwise

import pytest
from profiled_steps import build, step

import memkernels
from memkernels.profiling.categories import CATEGORIES
from memkernels.profiling.page import _STRETCHES, write

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")


@pytest.fixture(scope="module")
def recorded():
    model, optimizer, x = build()
    step(model, optimizer, x)
    with memkernels.profile() as recorded:
        step(model, optimizer, x)
    return recorded


def test_fewer_points_keep_the_peak(recorded):
    (timeline,) = recorded.timelines
    reduced = timeline.reduced(20)
    assert len(reduced.times) <= 41 < len(timeline.times) and reduced.peak == timeline.peak
    assert reduced.times == sorted(set(reduced.times)) and reduced.times[0] == timeline.times[0] == 0
    assert [reduced.total(i) for i in (0, -1)] == [timeline.total(i) for i in (0, -1)]


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def show(page, path):
    """The page's elements once a browser has run it, as text."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path}", "--dump-dom"]
    done = subprocess.run(
        [*command, "--window-size=1200,900", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Moves the pointer to each fraction of the chart, then out of it; notes the tip: whether it is hidden, and its text.
POINT = """<pre id="told"></pre><script>
  const svg = document.querySelector("svg"), box = svg.getBoundingClientRect(), tip = document.querySelector(".tip");
  const told = FRACTIONS.map((fraction) => {
    const place = LEFT + (svg.viewBox.baseVal.width - LEFT - RIGHT) * fraction;
    const clientX = box.left + place * box.width / svg.viewBox.baseVal.width;
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY: box.top + 100 }));
    const cells = [...tip.querySelectorAll("tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
    return [tip.style.display, tip.querySelector(".when").textContent, Object.fromEntries(cells)];
  });
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  document.getElementById("told").textContent = JSON.stringify([told, tip.style.display]);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_draws_the_page_and_tells_what_is_under_the_pointer(recorded, tmp_path):
    timeline = recorded.timelines[0].reduced(_STRETCHES)
    page = tmp_path / "step.html"
    write(recorded.timelines, page)
    text = page.read_text()
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not fetched
    # Of each phase the middle of what lasts longest between two events.
    events = list(pairwise(timeline.times))
    longest = [
        max((pair for pair in events if first <= pair[0] and pair[1] <= last), key=lambda pair: pair[1] - pair[0])
        for _, first, last in timeline.phases
    ]
    middles = [sum(pair) / 2 for pair in longest]
    fractions = json.dumps([middle / timeline.times[-1] for middle in middles])
    page.write_text(text.replace("</body>", POINT.replace("FRACTIONS", fractions)))
    shown = show(page, tmp_path / "browser")
    drawn = re.findall(r'data-series="(\w+)"', shown)
    series = timeline.series | {"offloaded": timeline.offloaded}
    assert drawn == [name for name, values in series.items() if any(values)]
    assert "Memory on cpu" in shown and ("aten::linear" in shown or "TanhBackward0" in shown)
    told, after = json.loads(html.unescape(re.search('<pre id="told">(.*?)</pre>', shown).group(1)))
    expected = []
    for middle, (phase, *_) in zip(middles, timeline.phases, strict=True):
        found = timeline.by_category(max(i for i, time in enumerate(timeline.times) if time <= middle))
        rows = {CATEGORIES[name].label: human(value) for name, value in found.items() if name in drawn}
        expected.append(["", f"{1000 * middle:.{2 if middle < 0.1 else 1}f} ms, {phase}", rows])
        expected[-1][2]["in all"] = human(sum(found.values()))
    assert told == expected and after == "none"
    assert len({str(rows) for *_, rows in told}) == 3


def human(value):
    """Bytes as the page writes them."""
    units = iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:#.3g} {unit}"
