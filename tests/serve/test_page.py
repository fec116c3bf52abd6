"""The page at /, in a browser: clicked, dropped on, read; it loads nothing from elsewhere."""

import base64
import io
import json
import re
import shutil

import pytest
import toy
from fastapi import Request
from fastapi.responses import StreamingResponse
from PIL import Image

from bigbase_jax.core import Fields
from bigbase_jax.serve import keys
from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Pictures:
    """Reads files: the mean of a picture is all that the model sees."""

    fields = Fields({"image": [("image",)]}, files=True)

    def decode(self, given):
        mean = sum(Image.open(io.BytesIO(given)).convert("RGB").resize((1, 1)).getpixel((0, 0))) / 765
        return [{"x": toy.np.full(toy.WIDTH, mean, "f4")}]

    def fit(self, example, shapes):
        return example


class Texts(Pictures):
    """Reads a text, of which the model sees the length."""

    fields = Fields({"text": [("text",)]}, lines=True)

    def decode(self, given):
        return [{"x": toy.np.full(toy.WIDTH, len(given["text"]), "f4")}]


class Shares(toy.Linear):
    def postprocess(self, output, example):
        x = float(example["x"][0])
        lists = {"items": [{"item": "i7", "title": "<i>Seven</i>", "score": 0.25}, {"item": "i9", "score": -1.0}]}
        return {"label": f"<b>{x:.2f}</b>", **lists, "probabilities": {"bright": x % 1, "dark": 1 - x % 1}}


def model(codec):
    found = toy.predictor()
    found.task = Shares()
    found.read = lambda: toy.Reading(codec())
    return found


class Found(toy.Linear):
    def postprocess(self, output, example):
        objects = [{"label": name, "score": 0.9, "box": box} for name, box in BOXES.items()]
        return {"objects": objects, "width": 60, "height": 40}


BOXES = {"<b>cat</b>": [6, 4, 30, 20], "dog": [0, 0, 60, 40]}


def app_of(settings=None):
    def opened(name, codec, *does):
        served = Served(name, model(codec), Options(max_batch=1))
        served.card["does"] += does
        return served

    def finds():
        served = opened("scenes", Pictures)
        served.predictor.task = Found()
        return served

    named = {"pictures": lambda: opened("pictures", Pictures), "texts": lambda: opened("texts", Texts, "chat")}
    named["reader"] = lambda: opened("reader", Pictures, "chat", "see")
    models = Models({**named, "scenes": finds})
    models.load()
    app = create(models, settings)

    @app.post("/v1/chat/completions", include_in_schema=False)
    async def chat(request: Request):
        said = (await request.json())["messages"][-1]["content"]
        if isinstance(said, list):
            head, data = said[1]["image_url"]["url"].split(",")
            with Image.open(io.BytesIO(base64.b64decode(data))) as seen:
                said = f"{said[0]['text']} {head} {seen.size}"
        pieces = [{"choices": [{"delta": {"content": x}, "finish_reason": None}]} for x in ("you said ", said)]
        pieces.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        lines = [*(f"data: {json.dumps(piece)}\n\n" for piece in pieces), "data: [DONE]\n\n"]
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    app.router.routes.insert(0, app.router.routes.pop())  # in the place of the server's own
    return app


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as api:
        found = api.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    with toy.live(app_of()) as port:
        context = browser.new_context()
        context.set_default_timeout(60_000)
        found = context.new_page()
        said, asked = [], []
        found.on("console", lambda message: said.append(message.text))
        found.on("pageerror", lambda error: said.append(str(error)))
        found.on("request", lambda request: asked.append(request.url))
        found.goto(f"http://127.0.0.1:{port}/")
        playwright.expect(found.locator("#state")).to_have_text("ready")
        yield found
        assert not said  # neither an error nor something that the policy has refused
        assert all(re.match(rf"(http://127.0.0.1:{port}/|blob:|data:)", url) for url in asked)
        context.close()


def picture():
    data = io.BytesIO()
    Image.new("RGB", (60, 40), (204, 204, 204)).save(data, "PNG")
    return data.getvalue()


def drop(page, place):
    dropped = """([target, text]) => {
        const bytes = Uint8Array.from(atob(text), x => x.charCodeAt(0)), moved = new DataTransfer();
        moved.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        target.dispatchEvent(new DragEvent("drop", {dataTransfer: moved, bubbles: true, cancelable: true}));
    }"""
    page.evaluate(dropped, [page.locator(place).element_handle(), base64.b64encode(picture()).decode()])


def test_boxes_are_drawn_on_the_picture(page):
    expect = playwright.expect
    page.locator("#model").select_option("scenes")
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    expect(page.locator("#answer rect")).to_have_count(2)
    expect(page.locator("#answer .boxed text")).to_have_text(["dog 90 %", "<b>cat</b> 90 %"])
    shown, rect = page.locator("#answer img").bounding_box(), page.locator("#answer rect").nth(1).bounding_box()
    assert shown["width"] / shown["height"] == pytest.approx(1.5, abs=0.05)
    assert rect["x"] - shown["x"] == pytest.approx(shown["width"] * 6 / 60, abs=2)
    assert rect["width"] == pytest.approx(shown["width"] * 24 / 60, abs=3)


def test_a_picture_is_chosen_or_dropped_and_answered(page):
    expect = playwright.expect
    with page.expect_file_chooser() as chooser:
        page.locator("#drop").click()
    chooser.value.set_files({"name": "a b.png", "mimeType": "image/png", "buffer": picture()})
    expect(page.locator("#answer .best")).to_have_text("<b>0.80</b>")  # as text
    expect(page.locator(".bars span").first).to_have_text("bright")
    expect(page.locator(".bars")).to_contain_text("80.0 %")
    expect(page.locator("#took")).to_contain_text("ms")
    assert "-F file=@'a b.png' http://127.0.0.1" in page.locator("#curl").text_content()
    assert page.locator("#drop img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 60
    drop(page, "#drop")
    expect(page.locator("#drop span")).to_have_text("dropped.png")
    expect(page.locator("#curl")).to_contain_text("dropped.png")


def test_a_text_is_typed_and_a_chat_streams(page):
    expect = playwright.expect
    page.locator("#model").select_option("texts")
    expect(page.locator("#drop")).to_be_hidden()
    page.locator("#entry-text").fill("it's")
    page.locator("#send").click()
    expect(page.locator("#answer .best")).to_have_text("<b>4.00</b>")
    ranked = page.locator("#answer ol li")
    expect(ranked).to_have_text(["<i>Seven</i>i7 · 0.250", "i9-1.00"])
    assert """--json '{"text":"it'\\''s"}'""" in page.locator("#curl").text_content()
    page.locator("#say").fill("<i>hello</i>")
    page.locator("#say").press("Enter")
    expect(page.locator("#talk .assistant")).to_have_text("you said <i>hello</i>")
    expect(page.locator("#talk")).to_contain_text("stop")
    page.locator("#anew").click()
    expect(page.locator("#talk p")).to_have_count(0)
    page.locator("#api summary").click()
    expect(page.locator("#routes")).to_contain_text("POST /v1/predict/{name}")


def test_a_picture_dropped_on_the_talk_goes_with_the_question(page):
    page.locator("#model").select_option("reader")
    page.locator("#talk").scroll_into_view_if_needed()
    drop(page, "#talk")
    page.locator("#say").fill("what is it?")
    page.locator("#say").press("Enter")
    playwright.expect(page.locator("#talk .user")).to_have_text("what is it?")
    playwright.expect(page.locator("#talk .assistant")).to_have_text(
        "you said what is it? data:image/png;base64 (60, 40)"
    )


def test_a_server_with_keys_asks_for_one(browser, tmp_path):
    key = keys.add(tmp_path / "keys", "ann")
    with toy.live(app_of(Settings(keys=keys.Keys(tmp_path / "keys")))) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        playwright.expect(page.locator("#state")).to_contain_text("needs a key")
        page.locator("#key").fill(key)
        page.locator("#key").press("Tab")
        playwright.expect(page.locator("#state")).to_have_text("ready")
        page.locator("#model").select_option("texts")
        page.locator("#entry-text").fill("a")
        page.locator("#send").click()
        playwright.expect(page.locator("#answer .best")).to_have_text("<b>1.00</b>")
        assert key not in page.locator("#curl").text_content()
        page.close()
