"""The page in a real browser: what it measures and paints at a phone's width and at a desk's."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from fedpeft.report.page import write_report

pytestmark = pytest.mark.browser

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip
MEASURE = """
<body style="margin:0"><iframe style="border:0" width="{width}" height="4000" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentDocument;
  const box = element => {{ const r = element.getBoundingClientRect(); return [r.left, r.right, r.height]; }};
  const said = document.createElement("pre");
  said.id = "measured";
  said.textContent = JSON.stringify({{
    page: inside.documentElement.scrollWidth,
    plots: [...inside.querySelectorAll(".plot svg")].map(box),
    modules: [...inside.querySelectorAll(".modules tbody th")].map(box),
    letters: Math.min(...[...inside.querySelectorAll(".plot svg text")].map(t => t.getBoundingClientRect().height)),
    fetched: inside.defaultView.performance.getEntriesByType("resource").map(entry => entry.name),
  }});
  document.body.replaceChildren(said);
}});
</script></body>
"""


def browser() -> str:
    """The path of a Chromium."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("no Chromium was found on the PATH: install the package chromium to check the report page")
    return found


def open_page(page: Path, folder: Path, *arguments: str) -> str:
    """What Chromium prints after it has opened `page` with a profile of its own."""
    command = [browser(), *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def measured(page: Path, folder: Path, width: int) -> dict[str, object]:
    around = folder / "around.html"
    around.write_text(MEASURE.format(width=width, page=html.escape(page.read_text())))
    dom = open_page(around, folder, f"--window-size={max(width, 500)},4000", "--virtual-time-budget=5000", "--dump-dom")
    return json.loads(html.unescape(re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)[1]))


@pytest.mark.parametrize(("width", "columns"), [(360, 1), (1400, 2)])
def test_every_plot_has_a_size_and_nothing_is_wider_than_the_page(width, columns, run_folder, tmp_path):
    sizes = measured(write_report(run_folder), tmp_path, width)
    assert sizes["page"] <= width
    assert len(sizes["plots"]) == 8
    assert all(
        left >= 0 and right <= width and right - left > 280 and height > 150 for left, right, height in sizes["plots"]
    )
    assert len({round(left) for left, _, _ in sizes["plots"]}) == columns
    assert sizes["letters"] >= 8
    assert sizes["fetched"] == []


@pytest.mark.parametrize(("width", "columns"), [(360, 1), (1400, 2)])
def test_the_merges_fit_beside_the_rest_and_names_of_modules_leave_room_for_figures(
    width, columns, merged_folder, tmp_path
):
    path = merged_folder / "journal.jsonl"
    path.write_text(path.read_text().replace("layer.0.", "bert.encoder.layer.0.attention.self."))
    sizes = measured(write_report(merged_folder), tmp_path, width)
    assert sizes["page"] <= width
    assert len(sizes["plots"]) == 11
    assert all(left >= 0 and right <= width and height > 150 for left, right, height in sizes["plots"])
    assert len({round(left) for left, _, _ in sizes["plots"]}) == columns
    assert sizes["letters"] >= 8
    assert len(sizes["modules"]) == 3
    assert all(right - left <= width / 2 for left, right, _ in sizes["modules"])


def test_a_page_that_did_fetch_something_would_be_caught(run_folder, tmp_path):
    page = write_report(run_folder)
    page.write_text(page.read_text().replace("</main>", '<img src="http://127.0.0.1:9/dot.png" alt=""></main>'))
    assert measured(page, tmp_path, 1400)["fetched"] == ["http://127.0.0.1:9/dot.png"]


def test_the_page_is_painted_with_its_plots_in_both_columns(run_folder, tmp_path):
    picture = tmp_path / "page.png"
    open_page(write_report(run_folder), tmp_path, "--window-size=1400,2400", f"--screenshot={picture}")
    pixels = image.imread(picture)[..., :3]
    assert pixels.shape == (2400, 1400, 3)
    blue = np.abs(pixels - np.array([0x1F, 0x5A, 0xA6]) / 255).max(axis=-1) < 0.05
    assert blue[:, :700].sum() > 2000
    assert blue[:, 700:].sum() > 2000
