"""The playground in Debian's Chromium, over a fake mesh that can be held at any moment of a job."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import structlog
from playwright.sync_api import Page, expect, sync_playwright
from served import eventually

from gateway.media.mp4 import read_frames

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"]
PATIENCE_MS = 15_000
FRAMES = 17
HOSTILE = """</script><img src=x onerror="window.owned=1"><svg onload=window.owned=1> 'a' $(touch owned) `id` \\ ü"""

pytestmark = [pytest.mark.browser, pytest.mark.timeout(90)]


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture(scope="module")
def browser():
    """One for all tests of this file. The session may not have it: while it lives, `asyncio.run` refuses to."""
    if not CHROMIUM.exists():
        pytest.fail(f"the playground is tested in {CHROMIUM}, which is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, gateway):
    """A function that opens the playground in a fresh context; in the end nothing may have gone wrong on any page."""
    contexts, wrong, ours = [], [], (gateway.url, "data:", f"blob:{gateway.url}", "about:")

    def visit(fragment="", before=lambda page: None, **settings) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | settings)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.add_init_script(WATCH)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if "Policy" in message.text else None)
        page.on("request", lambda sent: None if sent.url.startswith(ours) else wrong.append(sent.url))
        before(page)
        page.goto(f"{gateway.url}/playground{fragment}")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


expect.set_options(timeout=PATIENCE_MS)


def until(page: Page, condition: str) -> None:
    """Playwright's own waiting evaluates text in the page, which the page forbids."""
    eventually(lambda: page.evaluate(condition), PATIENCE_MS / 1000)


def ask(page: Page, prompt: str = "a red square moves right", **fields: str) -> None:
    for name, text in {"num_inference_steps": "4", **fields}.items():
        page.locator(f"#{name}").fill(text)
    page.locator("#prompt").fill(prompt)
    page.keyboard.press("Control+Enter")


def pictures(page: Page):
    return page.locator("#strip img")


WATCH = """addEventListener("DOMContentLoaded", () => {
    const video = document.getElementById("video");
    if (!video) return;
    const pen = new OffscreenCanvas(64, 64).getContext("2d", {willReadFrequently: true});
    window.presented = [];
    const look = (now, {mediaTime}) => {
        pen.drawImage(video, 0, 0, 64, 64);
        const row = [...pen.getImageData(0, 24, 64, 1).data].filter((_, at) => at % 4 === 0);
        const bright = row.flatMap((value, x) => (value > 128 ? [x] : []));
        presented.push({number: Math.round(mediaTime * 8), left: bright[0], width: bright.length});
        video.requestVideoFrameCallback(look);
    };
    video.requestVideoFrameCallback(look);
})"""
"""Notes every frame that the video really presents: its number by the clock, and where the square is in its pixels."""


def presented(page: Page, at_least: int) -> list[int]:
    """The numbers of the frames that were presented until now; their pictures must be those frames'."""
    until(page, f"presented.length >= {at_least}")
    seen = page.evaluate("presented")
    for frame in seen:
        assert abs(frame["left"] - 2 * frame["number"]) <= 1, seen
        assert 14 <= frame["width"] <= 18, seen
    return [frame["number"] for frame in seen]


def test_a_typed_prompt_becomes_a_video_that_plays_while_it_is_decoded(visit, gateway, fake):
    fake.held = {"queued", "denoise:2", "decode:3"}
    page = visit()
    ask(page, previews="20")
    fake.wait_for("queued")
    expect(page.locator("#now")).to_have_text("Queued")
    expect(page.locator("#rest")).to_contain_text("next in line")
    fake.release("queued")
    video_id = fake.wait_for("denoise:2")
    expect(page.locator("#now")).to_have_text("Denoising")
    expect(page.locator("#rest")).to_have_text("step 2 of 4 · about 2 s left")
    expect(page.locator("#caption")).to_have_text("preview after step 2")
    assert page.evaluate("document.getElementById('still').naturalWidth") > 0
    assert page.locator("#track").get_attribute("aria-valuenow") == "45"
    assert pictures(page).count() == 0
    fake.release("denoise:2")
    fake.wait_for("decode:3")
    expect(pictures(page)).to_have_count(9)
    expect(page.locator("#rest")).to_have_text("frame 9 of 17")
    assert gateway.video(video_id)["status"] == "in_progress"
    assert max(presented(page, 3)) < 9
    fake.release()
    expect(page.locator("#now")).to_have_text("Done")
    expect(page.locator("#rest")).to_have_text(re.compile(r"in 1\.0 s · first frame after \d"))
    expect(pictures(page)).to_have_count(FRAMES)
    until(page, f"presented.some((frame) => frame.number === {FRAMES - 1})")
    assert set(presented(page, 10)) <= set(range(FRAMES))
    assert page.locator("#track .segment").all_inner_texts()[2] == "Denoise 500 ms"
    with page.expect_download() as saved:
        page.get_by_role("link", name="Download").click()
    assert saved.value.suggested_filename == f"{video_id}.mp4"
    assert len(read_frames(saved.value.path())) == FRAMES


def test_where_the_browser_cannot_play_what_grows_the_frames_come_alone_and_the_video_at_the_end(visit, fake):
    fake.held = {"decode:2"}
    page = visit(before=lambda page: page.add_init_script("delete window.MediaSource"))
    ask(page)
    fake.wait_for("decode:2")
    expect(pictures(page)).to_have_count(5)
    expect(page.locator("#caption")).to_have_text("frame 5 of 17")
    assert page.locator("#viewer").get_attribute("data-shows") == "still"
    fake.release()
    expect(page.locator("#viewer")).to_have_attribute("data-shows", "video")
    assert presented(page, 3)


def test_the_filmstrip_steps_through_the_video(visit, gateway):
    video_id = gateway.create()
    gateway.wait(video_id)
    page = visit(f"#{video_id}")
    expect(pictures(page)).to_have_count(FRAMES)
    expect(page.locator("#viewer")).to_have_attribute("data-shows", "video")
    page.locator("#strip span").nth(5).click()
    expect(page.locator("#video")).to_have_js_property("paused", True)
    until(page, "Math.abs(document.getElementById('video').currentTime - 5.5 / 8) < 0.01")
    page.locator("#strip").focus()
    page.keyboard.press("ArrowRight")
    until(page, "Math.abs(document.getElementById('video').currentTime - 6.5 / 8) < 0.01")
    expect(page.get_by_role("slider", name="Frame")).to_have_attribute("aria-valuenow", "7")


def test_cancel_reaches_the_mesh(visit, gateway, fake):
    fake.held = {"denoise:2"}
    page = visit()
    ask(page)
    video_id = fake.wait_for("denoise:2")
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#now")).to_have_text("Cancelled")
    eventually(lambda: fake.cancelled == [video_id])
    expect(page.locator("#now")).to_be_focused()
    expect(page.locator("#failure")).to_have_text("cancelled by the client")
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_hidden()
    assert gateway.video(video_id)["status"] == "cancelled"


def test_leaving_and_reloading_cancels_nothing_and_finds_what_runs(visit, gateway, fake):
    fake.held = {"denoise:2", "decode:2"}
    page = visit()
    ask(page, "the first one")
    video_id = fake.wait_for("denoise:2")
    expect(page).to_have_url(f"{gateway.url}/playground#{video_id}")
    page.reload()
    expect(page.locator("#rest")).to_contain_text("step 2 of 4")
    fake.release("denoise:2")
    fake.wait_for("decode:2")
    page.goto("about:blank")
    page.goto(f"{gateway.url}/playground")
    expect(page.locator("#prompt-shown")).to_have_text("the first one")
    expect(pictures(page)).to_have_count(5)
    fake.release()
    expect(page.locator("#now")).to_have_text("Done")
    assert not fake.cancelled


def test_a_list_that_was_not_answered_is_asked_for_again(visit, fake):
    fake.held = {"denoise:2"}
    ask(visit(), "the running one")
    fake.wait_for("denoise:2")
    answers = iter(["abort"])

    def fail_once(route):
        if next(answers, "") == "abort":
            route.abort()
        else:
            route.continue_()

    page = visit(before=lambda page: page.route("**/v1/videos?*", fail_once))
    expect(page.locator("#prompt-shown")).to_have_text("the running one")
    fake.release()
    expect(page.locator("#now")).to_have_text("Done")


def test_a_failure_is_told_in_the_words_of_the_api(visit, fake):
    fake.failures = {"denoise:2": ("out_of_memory", "64x64 does not fit; take a smaller size")}
    page = visit()
    ask(page)
    expect(page.locator("#now")).to_have_text("Failed")
    expect(page.locator("#failure")).to_have_text("64x64 does not fit; take a smaller size")


def test_a_refusal_is_told_at_its_field_as_the_api_words_it(visit, gateway, fake):
    refused = gateway.http.post("/v1/videos", json={"prompt": "a", "size": "100x64"}).json()["error"]
    page = visit()
    ask(page, size="100x64")
    size = page.get_by_label("Size")
    expect(size).to_have_attribute("aria-invalid", "true")
    expect(size).to_be_focused()
    expect(size).to_have_accessible_description(refused["message"])
    size.fill("96x64")
    ask(page, num_frames="many")
    expect(page.get_by_label("Frames", exact=True)).to_have_accessible_description(re.compile("integer"))
    expect(size).not_to_have_attribute("aria-invalid", "true")
    ask(page, "", num_frames="")
    expect(page.get_by_label("Prompt", exact=True)).to_have_attribute("aria-invalid", "true")
    assert not fake.submitted


def test_what_is_typed_is_what_is_asked_for(visit, fake):
    page = visit()
    page.get_by_label("random").uncheck()
    typed = {"negative_prompt": "rain", "size": "96x64", "num_frames": "9", "guidance_scale": "2.5",
             "seed": str(2**60 + 1), "previews": "0"}  # fmt: skip
    ask(page, **typed)
    expect(page.locator("#now")).to_have_text("Done")
    params = fake.submitted[0].params
    assert (params.negative_prompt, params.width, params.height, params.num_frames) == ("rain", 96, 64, 9)
    assert (params.guidance_scale, params.seed, params.num_inference_steps) == (2.5, 2**60 + 1, 4)
    assert fake.submitted[0].previews == 0


def test_what_comes_from_outside_is_text(visit, gateway):
    page = visit()
    ask(page, HOSTILE)
    expect(page.locator("#now")).to_have_text("Done")
    assert page.locator("#prompt-shown").text_content() == HOSTILE
    expect(page.locator("#list .title")).to_have_text(HOSTILE)
    assert page.evaluate("window.owned") is None
    assert page.locator("#job svg, #list svg, img[src=x]").count() == 0
    ask(page, HOSTILE, size=HOSTILE[:40])
    expect(page.locator("#size-error")).to_contain_text("</script>")


def test_the_curl_command_is_the_same_request(visit, gateway, tmp_path):
    page = visit()
    page.get_by_label("Prompt", exact=True).fill(HOSTILE)
    page.get_by_label("Steps").fill("4")
    page.get_by_role("button", name="curl").click()
    command = page.get_by_role("dialog").locator("pre").text_content()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True)
    video = json.loads(done.stdout)
    assert (video["prompt"], video["num_inference_steps"]) == (HOSTILE, 4)
    assert not (tmp_path / "owned").exists()


def test_the_list_pages_opens_remixes_and_deletes(visit, gateway, fake):
    ids = [gateway.create(prompt=f"number {number}", num_frames=1, num_inference_steps=1) for number in range(10)]
    for video_id in ids:
        gateway.wait(video_id)
    page = visit()
    rows = page.locator("#list button")
    expect(rows).to_have_count(8)
    expect(rows.first).to_contain_text("number 9")
    page.get_by_role("button", name="More").click()
    expect(rows).to_have_count(10)
    expect(page.get_by_role("button", name="More")).to_be_hidden()
    rows.last.click()
    expect(page.locator("#prompt-shown")).to_have_text("number 0")
    expect(rows.last).to_have_attribute("aria-current", "true")
    page.get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert gateway.video(ids[0])
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#job")).to_be_hidden()
    assert gateway.http.get(f"/v1/videos/{ids[0]}").status_code == 404
    page.reload()
    rows.first.click()
    page.get_by_role("button", name="Remix").click()
    page.get_by_label("Prompt of the remix").fill("another one")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#prompt-shown")).to_have_text("another one")
    expect(page.locator("#now")).to_have_text("Done")
    first, last = fake.submitted[9].params, fake.submitted[10].params
    assert (last.prompt, last.seed) == ("another one", first.seed)


def test_the_list_has_thumbnails(visit, gateway):
    gateway.wait(gateway.create())
    page = visit()
    expect(page.locator("#list img")).to_have_count(1)
    eventually(lambda: page.evaluate("document.querySelector('#list img').naturalWidth") == 64)


def test_the_mesh_is_shown_and_asked_once_a_second_while_somebody_looks(visit, fake):
    page = visit(before=lambda page: page.clock.install())
    expect(page.locator(".ranks li")).to_have_count(2)
    expect(page.locator(".mesh")).to_contain_text("ulysses 2")
    expect(page.locator(".times")).to_contain_text("100 ms")
    expect(page.locator("#server")).to_contain_text("ready")

    def asks() -> int:
        """How often it asks within four seconds. Each answer starts the next second."""
        asked = []
        page.on("requestfinished", lambda sent: asked.append(sent) if sent.url.endswith("/server_info") else None)
        for second in range(1, 5):
            page.clock.run_for(1000)
            page.evaluate("fetch('health/live').then((answer) => answer.text())")
            if not page.evaluate("document.hidden"):
                eventually(lambda second=second: page.evaluate("1") and len(asked) == second)
        return len(asked)

    look = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    look += "document.dispatchEvent(new Event('visibilitychange'))"
    assert asks() == 4
    page.evaluate(look % "true")
    page.clock.run_for(1000)
    assert asks() == 0
    with page.expect_request("**/server_info"):
        page.evaluate(look % "false")
    fake.drain()
    page.clock.resume()
    expect(page.locator("#server")).to_contain_text("draining")


def test_the_keyboard_is_enough(visit, gateway, fake):
    page = visit()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type("typed")
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id"))
        if names[-1] == "num_inference_steps":
            page.keyboard.type("4")
        if names[-1] == "submit":
            break
    assert names[-1] == "submit", names
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#now")).to_have_text("Done")
    assert fake.submitted[0].params.prompt == "typed"
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    page.locator("#list button").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#list button")).to_be_focused()
    for control in page.locator("input, textarea, select, button, a, [tabindex='0']").all():
        if control.is_visible():
            expect(control).to_have_accessible_name(re.compile(r"\S"))


@pytest.mark.parametrize("width", [360, 390, 1000])
def test_a_narrow_window_scrolls_only_downwards(visit, gateway, width):
    video_id = gateway.create(prompt="a" * 300)
    gateway.wait(video_id)
    page = visit(f"#{video_id}", viewport={"width": width, "height": 800})
    expect(pictures(page)).to_have_count(FRAMES)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_light_dark_and_little_motion(visit):
    page = visit(color_scheme="light")
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert page.evaluate(brightness) > 200
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    assert page.evaluate(brightness) < 60
    assert page.evaluate("getComputedStyle(document.querySelector('.bar'), '::before').transitionDuration") == "0s"


def test_the_key_is_asked_for_kept_for_the_tab_and_sent_with_everything(visit, gateway):
    """A guard in front of the server stands for any way of configuring keys."""
    video_id = gateway.create()
    gateway.wait(video_id)
    refusal = {"error": {"message": "this key is not known", "type": "x", "param": None, "code": "invalid_api_key"}}
    naked = []

    def guard(route):
        key = route.request.headers.get("authorization")
        if key == "Bearer secret":
            return route.continue_()
        naked.append(route.request.url)
        return route.fulfill(status=401, json=refusal)

    page = visit(f"#{video_id}", before=lambda page: page.route(re.compile("/v1/|/server_info"), guard))
    field = page.get_by_label("This server asks for an API key")
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("this key is not known")
    field.fill("secret")
    naked.clear()
    page.keyboard.press("Enter")
    expect(field).to_be_hidden()
    expect(page.locator("#now")).to_have_text("Done")
    assert presented(page, 3)
    with page.expect_download() as saved:
        page.get_by_role("link", name="Download").click()
    assert len(read_frames(saved.value.path())) == FRAMES
    page.get_by_role("button", name="curl").click()
    assert "secret" not in page.content()
    page.reload()
    expect(page.locator("#now")).to_have_text("Done")
    assert not naked
    assert page.evaluate("Object.keys(localStorage).length") == 0


def test_an_image_model_shows_its_partials_and_its_picture(visit, gateway, fake):
    def as_image_model(route):
        answer = route.fetch()
        listed = answer.json()
        listed["data"][0]["task_type"] = "T2I"
        route.fulfill(response=answer, json=listed)

    page = visit(before=lambda page: page.route("**/v1/models", as_image_model))
    expect(page.get_by_label("Frames", exact=True)).to_be_hidden()
    fake.held = {"denoise:3"}
    ask(page)
    fake.wait_for("denoise:3")
    expect(page.locator("#caption")).to_have_text(re.compile("preview"))
    fake.release()
    expect(page.locator("#now")).to_have_text("Done")
    assert page.evaluate("document.getElementById('still').naturalWidth") == 64
    with page.expect_download() as saved:
        page.get_by_role("link", name="Download").click()
    assert saved.value.path().read_bytes().startswith(b"\x89PNG")
    fake.held = {"denoise:2"}
    ask(page)
    picture = fake.wait_for("denoise:2")
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#now")).to_have_text("Cancelled")
    eventually(lambda: fake.cancelled == [picture])


def test_the_page_is_whole_and_allows_nothing_from_elsewhere(gateway):
    root = gateway.http.get("/", follow_redirects=False)
    assert (root.status_code, root.headers["location"]) == (307, "playground")
    for name, kind in {"": "text/html", "/app.js": "text/javascript", "/style.css": "text/css"}.items():
        answer = gateway.http.get(f"/playground{name}").raise_for_status()
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "//" not in re.sub(r"http://www\.w3\.org/2000/svg|^ *// .*$|; // .*$", "", answer.text, flags=re.M)
    for wrong in ("/playground/app.py", "/playground/../app.py", "/playground/%2e%2e%2fapp.py"):
        assert gateway.http.get(wrong).status_code in {400, 404}
