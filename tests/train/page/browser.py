"""A page as a headless browser lays it out."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_LOOK = """
<script>
window.addEventListener("load", () => {
  const drawn = "polyline, rect.bar, circle";
  const big = box => box.width + box.height > 0;  // lines may be level
  const figures = [...document.querySelectorAll("figure")];
  const empty = figures.filter(each => ![...each.querySelectorAll(drawn)].some(shape => big(shape.getBBox())));
  const out = [...document.querySelectorAll("svg text")].filter(text => {
    const box = text.getBBox(), view = text.ownerSVGElement.viewBox.baseVal;
    return box.x < -1 || box.y < -1 || box.x + box.width > view.width + 1 || box.y + box.height > view.height + 1;
  });
  const inside = each => each.closest(".scroll") || each.closest("svg") || each.closest(".wide");
  const wide = [...document.body.querySelectorAll("*")].filter(each => !inside(each) &&
    each.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  const name = each => (each.querySelector("figcaption") || each).textContent.slice(0, 60);
  const found = {figures: figures.length, width: innerWidth, empty: empty.map(name), out: out.map(name),
    wide: wide.map(name), scrolls: document.documentElement.scrollWidth > innerWidth + 1};
  document.body.setAttribute("data-found", JSON.stringify(found));
});
</script>
"""


def browser() -> str | None:
    """The program, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def look(page: Path, width: int) -> dict[str, Any]:
    """What is wrong with a page at a width: figures without a shape, text beyond an edge, errors on the console."""
    copy = page.with_name(f"looked-at-{width}.html")
    copy.write_text(page.read_text().replace("</body>", f"{_LOOK}</body>"))
    program = browser()
    assert program is not None
    options = ["--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},2000", "--dump-dom"]
    done = subprocess.run([program, *options, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    told = re.search(r'data-found="([^"]*)"', done.stdout)
    assert told is not None, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(told[1]))
    return found | {"console": [line for line in done.stderr.splitlines() if ":CONSOLE" in line]}
