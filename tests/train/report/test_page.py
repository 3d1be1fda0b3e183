"""The finished page in a real browser: search with completion, an image at large, the map, a phone's width."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from data_pipeline.storage.manifest import load_manifest
from tests.support.small import write_data
from tests.train.report.test_explore import EVIL, RESULTS, shown
from train.config import RunConfig
from train.report.exhibit import Query
from train.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ACTIONS = """
<script>
const result = {};
const key = (name) => input.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const type = (text) => { input.value = text; input.dispatchEvent(new Event("input")); };
const names = (box) => [...find(box).querySelectorAll("small")].map((one) => one.textContent);
addEventListener("error", (event) => { result.error = event.message; });
type("dra");
result.offered = [...list.children].map((line) => line.textContent);
type("b");
key("ArrowDown"); key("ArrowUp"); key("Enter");
result.asked = input.value;
result.address = decodeURIComponent(location.hash);
result.closed = list.hidden;
result.held_out = names("found");
result.right = find("found").querySelectorAll(".right").length;
find("pool").lastElementChild.click();
result.all = names("found");
result.seen = find("found").querySelectorAll(".seen").length;
type("nothing like this");
result.none = [list.children.length, list.textContent];
key("Escape");
find("texts").querySelector(".hit.right").click();
const one = find("one");
result.large = [find("image").open, one.querySelector("h3").textContent, one.querySelectorAll(".pill").length];
one.querySelector(".pill").click();
result.pill = [find("image").open, input.value];
const canvas = find("plane"), box = canvas.getBoundingClientRect();
scan: for (let y = 4; y < box.height; y += 6) for (let x = 4; x < box.width; x += 6) {
  canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + x, clientY: box.top + y }));
  if (!find("tip").hidden) break scan;
}
result.tip = find("tip").textContent;
result.markup = document.querySelectorAll('img[src="x"], main b b').length;
result.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
result.ready = document.documentElement.dataset.ready;
document.body.dataset.result = JSON.stringify(result);
</script></body>
"""


def drive(page: Path, folder: Path, width: int) -> dict:
    """What ACTIONS find in the page, in a frame of this width, since a window has a least one."""
    acted = page.with_name("acted.html")
    acted.write_text(page.read_text().replace("</body>", ACTIONS))
    frame = page.with_name("frame.html")
    take = "document.title = frames[0].document.body.dataset.result"
    frame.write_text(f'<iframe src="acted.html" style="width: {width}px; height: 900px" onload="{take}"></iframe>')
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={folder}", "--virtual-time-budget=3000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_works_in_a_browser(tmp_path):
    manifest, training = (
        load_manifest(write_data(tmp_path / name, sizes)) for name, sizes in (("data", (7, 6)), ("training", (5,)))
    )
    (tmp_path / "metrics.jsonl").touch()
    given_to = shown(manifest, training)
    given_to.sets[0].features.captions[0] = EVIL
    given_to.queries[2] = Query(EVIL, "caption")
    page = write_report(tmp_path, RunConfig(), RESULTS, given_to)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])
    titles = [item["t"] for item in data["items"]]
    wide, phone = drive(page, tmp_path / "browser", 1280), drive(page, tmp_path / "browser", 390)
    for found in (wide, phone):
        assert "error" not in found and found["ready"] == "yes" and found["wide"] <= 0
        assert found["offered"] == ["drawingkeyword"]
        assert (found["asked"], found["address"], found["closed"]) == ("blue", "#blue", True)
        assert found["held_out"] == [titles[item] for item in data["queries"][0]["n"]]
        assert found["right"] == 3 and found["seen"] == 5
        assert found["all"] == [titles[item] for item in data["queries"][0]["a"]]
        assert found["none"][0] == 1 and found["none"][1].startswith("Nothing prepared begins like this")
        assert found["large"] == [True, data["text_gallery"][0]["t"], 6]
        assert found["pill"] == [False, data["queries"][data["texts"][data["text_gallery"][0]["right"]][0]]["t"]]
        assert any(found["tip"].startswith(title) for title in titles)
        assert found["markup"] == 0
