"""A page opened in headless Chromium, at several widths, and looked over."""

import functools
import html
import json
import re
import shutil
import subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

_PROBE = """
const found = {}, frames = [...document.querySelectorAll('iframe')];
const look = frame => {
  const page = frame.contentDocument, width = frame.clientWidth;
  const scrolls = e => { for (; e; e = e.parentElement)
    if (['auto', 'scroll'].includes(frame.contentWindow.getComputedStyle(e).overflowX)) return true; return false; };
  return {
    width: page.documentElement.scrollWidth,
    images: page.images.length,
    missing: [...page.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
    over: [...page.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e))
      .map(e => e.tagName + ': ' + e.textContent.slice(0, 60)),
    cut: [...page.querySelectorAll('th,td,h1,h2,p,figcaption')].filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth
      && !scrolls(e)).map(e => e.tagName + ': ' + e.textContent.slice(0, 60)),
    text: page.body.innerText.length,
  };
};
window.onload = () => { for (const f of frames) found[f.width] = look(f);
  document.body.innerHTML = '<pre id="found"></pre>'; document.getElementById('found').textContent = JSON.stringify(found); };
"""


@functools.cache
def opens():
    """Whether there is a Chromium here that starts."""
    if CHROMIUM is None:
        return False
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--dump-dom",
        "about:blank",
    ]
    try:
        return "<html>" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return False


def look_over(page, folder, widths=(390, 1100)):
    """What a browser sees of a page: by width, its scroll width, missing images, and what runs over the edge.

    Returns:
        Width → findings, and the console's messages.
    """
    frames = "".join(f'<iframe src="{html.escape(page.as_uri())}" width="{w}" height="900"></iframe>' for w in widths)
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}<script>{_PROBE}</script></body>")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
         "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000",
         "--dump-dom", wrapper.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    told = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {int(width): seen for width, seen in json.loads(html.unescape(told[1])).items()}, console
