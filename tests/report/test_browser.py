"""The page in a real browser: no error, no request, every picture, tables that sort, any width."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedlora.report import read_run, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
]
# The page lies in frames of two widths, as a browser's own window is never narrower than 500 pixels.
WATCH = """<!DOCTYPE html><meta charset="utf-8"><body><script>
const widths = [400, 1400], seen = [];
async function look(width) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.src = "PAGE";
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const page = frame.contentDocument, root = page.documentElement;
  const head = [...page.querySelectorAll("th")].find(th => th.textContent === "accuracy");
  const body = head.closest("table").tBodies[0];
  const column = () => [...body.rows].map(row => row.cells[head.cellIndex].textContent);
  const button = head.querySelector("button");
  button.focus();
  const focused = page.activeElement === button;
  button.click(); const up = column(), said = head.getAttribute("aria-sort");
  button.click(); const down = column(), then = head.getAttribute("aria-sort");
  const pictures = [...page.images].map(i => i.naturalWidth);
  const inner = root.clientWidth, scrolls = root.scrollWidth;
  return {width, inner, scrolls, pictures, up, said, down, then, focused};
}
(async () => {
  for (const width of widths) seen.push(await look(width));
  const pre = document.createElement("pre");
  pre.textContent = JSON.stringify(seen);
  document.body.append(pre);
})();
</script>"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a file, and gives the page as it stands then and what the console has said."""

    def look(page: Path) -> tuple[str, str]:
        home = tmp_path_factory.mktemp("chromium")
        own = [f"--user-data-dir={home}", "--allow-file-access-from-files", "--virtual-time-budget=5000"]
        done = subprocess.run(
            [str(CHROMIUM), *FLAGS, *own, "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    return look


@pytest.fixture
def seen(make_run, tmp_path, browse):
    """What the two frames have found on a page of four runs with long names and clients of two labels."""
    data = {
        "labels": ["a", "b"],
        "clients": [{"client": k, "name": "n" * 40, "rank": 4, "rows": 9, "labels": [4, 5]} for k in (0, 1)],
    }
    scores = [("FedIT", 0, 0.5), ("FedIT", 1, 0.75), ("FlexLoRA", 0, 0.25), ("SLoRA", 0, 0.95)]
    folders = [
        make_run(f"{name}-{seed}", f"x.{name}", {"seed": seed, "note": "word" * 30 + name}, accuracy=right)
        for name, seed, right in scores
    ]
    for folder in folders:
        (folder / "data.json").write_text(json.dumps(data))
    write_report([read_run(folder) for folder in folders], tmp_path / "report.html")
    watch = tmp_path / "watch.html"
    watch.write_text(WATCH.replace("PAGE", "report.html"))
    page, console = browse(watch)
    assert console == ""
    return json.loads(re.search("<pre>(.*?)</pre>", page)[1])


def test_the_page_works_in_a_narrow_and_a_wide_window(seen):
    assert [look["width"] for look in seen] == [400, 1400]
    for look in seen:
        assert look["scrolls"] <= look["inner"]
        assert len(look["pictures"]) == 6
        assert all(width > 0 for width in look["pictures"])
        assert look["focused"]
        assert (look["said"], look["then"]) == ("ascending", "descending")
        assert [cell[:5] for cell in look["up"]] == ["0.250", "0.625", "0.950"]
        assert look["down"] == look["up"][::-1]


def test_nothing_but_the_page_is_asked_for_and_no_other_script_runs(make_run, tmp_path, browse):
    page = write_report([read_run(make_run())], tmp_path / "report.html")
    evil = '<script>document.title = "ran"</script><img src="https://example.org/x.png">'
    page.write_text(page.read_text().replace("<h1>", f"{evil}<h1>", 1))
    shown, console = browse(page)
    assert "<title>ran</title>" not in shown
    assert console.count("Content Security Policy") >= 2
