"""The README's pictures of the playground: `python tests/screenshots.py`, from the demo model on two ranks.

Writes docs/playground-light.png (a video that is being made) and docs/playground-dark.png (one that is done).
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from served import ServerProcess
from test_playground import CHROMIUM, FLAGS

DOCS = Path(__file__).parent.parent / "docs"
PATIENCE_MS = 120_000
EARLIER = [
    "a green triangle with a white background, moving down",
    "a yellow circle moving up with a blue background",
    "a red star growing with a black background",
    "a large white square moving left on a purple background",
    "an orange circle going down on a gray background",
]
"""What the list shows."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(Path(folder), "--num-gpus", "2").wait_ready()
        try:
            for prompt in EARLIER:
                server.result(server.create(prompt=prompt, num_inference_steps=20, seed=1000))
            photograph(server.url)
        finally:
            server.end(15)
            server.kill()


def photograph(url: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        page.goto(f"{url}/playground")
        expect(page.locator("#list img")).to_have_count(len(EARLIER))
        ask(page, "a red circle moving right on a white background", num_inference_steps="120", previews="20")
        expect(page.locator("#caption")).to_have_text(re.compile(r"preview after step ([89]\d|1\d\d)"))
        save(page, "light")
        expect(page.locator("#now")).to_have_text("Done")
        page.emulate_media(color_scheme="dark")
        ask(page, "a yellow triangle moving left on a blue background", num_inference_steps="40", previews="12")
        expect(page.locator("#rest")).to_contain_text("first frame after")
        expect(page.locator("#list img")).to_have_count(len(EARLIER) + 2)
        expect(page.locator("#strip .at")).to_have_count(1)
        page.locator("#strip span").nth(8).click()
        save(page, "dark")
        browser.close()


def ask(page: Page, prompt: str, **fields: str) -> None:
    page.get_by_label("random").uncheck()
    for name, text in ({"seed": "1000"} | fields).items():
        page.locator(f"#{name}").fill(text)
    page.locator("#prompt").fill(prompt)
    page.get_by_role("button", name="Generate").click()


def save(page: Page, name: str) -> None:
    """As PNG with 256 colours, which is a third of the size and looks the same."""
    path = DOCS / f"playground-{name}.png"
    page.screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
