"""The page of models that hear and speak, in a browser whose microphone plays a recording."""

import os
import re
import shutil

import ears
import numpy as np
import pytest
import toy
from waiting import until

from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.keys import Keys, add
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = os.environ.get("BIGBASE_SHOTS")  # a folder, for somebody who wants to look


def shot(page, name):
    if SHOTS:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=f"{SHOTS}/{name}-{scheme}.png", full_page=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    sound = tmp_path_factory.mktemp("sound") / "said.wav"
    x_T = np.concatenate([ears.whistled("two three", 48_000)] * 4)
    sound.write_bytes(ears.wav(x_T, 48_000))
    fake = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    args = [
        "--no-sandbox",
        *fake,
        f"--use-file-for-fake-audio-capture={sound}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with playwright.sync_playwright() as api:
        found = api.chromium.launch(executable_path=BROWSER, args=args)
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = Models(
        {
            "ear": lambda: Served("ear", ears.ear(), Options(max_batch=8)),
            "live": lambda: ears.listening(Served("live", ears.ear(), Options(max_batch=8))),
            "mouth": lambda: Served("mouth", ears.mouth(), Options(max_batch=1)),
        }
    )
    models.load()
    file = tmp_path_factory.mktemp("keys") / "keys"
    key = add(file, "ann")
    with toy.live(create(models, Settings(keys=Keys(file)))) as port:
        yield port, key
    models.close(5)


@pytest.fixture
def page(browser, server):
    context = browser.new_context(permissions=["microphone"], viewport={"width": 900, "height": 700})
    context.set_default_timeout(60_000)
    found, said, asked = context.new_page(), [], []
    found.on("console", lambda message: said.append(message.text))
    found.on("pageerror", lambda error: said.append(str(error)))
    found.on("request", lambda request: asked.append(request.url))
    found.goto(f"http://127.0.0.1:{server[0]}/")
    found.locator("#key").fill(server[1])
    found.locator("#key").press("Tab")
    playwright.expect(found.locator("#state")).to_have_text("ready")
    yield found
    refused = re.compile("status of 40[01]")  # without a key, and for a text without a word
    assert not [line for line in said if not refused.search(line)]
    assert all(re.match(rf"(http|ws)://127.0.0.1:{server[0]}/|blob:|data:", url) for url in asked)
    context.close()


def spoken_for(page, wanted):
    level = "parseFloat(document.getElementById('level').textContent || '0')"
    until(lambda: page.evaluate(level) >= wanted)


def test_a_recording_is_chosen_and_its_words_are_buttons(page):
    expect = playwright.expect
    page.locator("#model").select_option("ear")
    with page.expect_file_chooser() as chooser:
        page.locator("#drop").click()
    data = ears.wav(ears.whistled("two one three"))
    chooser.value.set_files({"name": "a.wav", "mimeType": "audio/wav", "buffer": data})
    expect(page.locator("#answer .best")).to_have_text("two one three")
    words = page.locator("#answer .words button")
    expect(words).to_have_text(["two", "one", "three"])
    expect(page.locator("#player")).to_be_visible()
    words.nth(2).click()
    until(lambda: page.locator("#player").evaluate("x => x.currentTime") >= 1)
    shot(page, "heard")


def test_the_microphone_is_recorded_and_transcribed(page):
    expect = playwright.expect
    page.locator("#model").select_option("ear")
    words = re.compile("(two three|three two)")
    for _ in range(3):  # a browser that is short of time hears its microphone with gaps
        page.locator("#record").click()
        expect(page.locator("#record")).to_have_text("Stop")
        spoken_for(page, 2.6)  # shown rounded
        shot(page, "recording")
        with page.expect_response(lambda response: response.request.method == "POST"):
            page.locator("#record").click()
        if words.search(page.locator("#answer .best").text_content()):
            break
    expect(page.locator("#answer .best")).to_contain_text(words)
    expect(page.locator("#drop span")).to_have_text("recording.wav")
    until(lambda: page.locator("#player").evaluate("x => x.duration || 0") >= 2.5)


def test_the_microphone_is_heard_live(page):
    expect = playwright.expect
    page.locator("#model").select_option("live")
    page.locator("#record").click()
    expect(page.locator("#answer .open")).to_contain_text("two")  # while it is recorded
    shot(page, "live")
    page.locator("#record").click()
    expect(page.locator("#answer .best").first).to_contain_text("two")
    expect(page.locator("#record")).to_have_text("Record")
    expect(page.locator("#answer .times")).to_be_visible()
    shot(page, "live-ended")


def test_a_text_is_spoken_and_played(page):
    expect = playwright.expect
    page.locator("#model").select_option("mouth")
    expect(page.locator("#record")).to_be_hidden()
    page.locator("#entry-text").fill("one two")
    page.locator("#voice").select_option("high")
    page.locator("#speed").fill("2")
    page.locator("#send").click()
    expect(page.locator("#spoken")).to_be_visible()
    until(lambda: page.locator("#spoken").evaluate("x => x.ended"))
    assert page.locator("#spoken").evaluate("x => x.duration") == pytest.approx(0.5, abs=0.01)
    assert '"voice":"high"' in page.locator("#curl").text_content()
    shot(page, "spoken")
    page.locator("#entry-text").fill("...")
    page.locator("#send").click()
    expect(page.locator("#answer .error")).to_contain_text("no word that can be spoken")
