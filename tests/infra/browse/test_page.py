"""The page in a browser, by clicks and keys, over a dataset of a hundred thousand clips."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import browsed
import chromium
import numpy as np
import pytest
import scored
from chromium import until

from longtake.datasets import alike, index, view
from longtake.infra.browse.library import load
from longtake.pipeline import queries

pytestmark = [pytest.mark.slow, chromium.there]
CLIPS, WIDTH = 100_000, 8
FOLDER = "<img src=x onerror=document.title='taken'>"
VIEW = "<b onclick=alert(1)>calm"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browse") / FOLDER
    url = browsed.make_dataset(folder, CLIPS)
    shutil.copy(folder / "views" / "calm.parquet", folder / "views" / f"{VIEW}.parquet")
    scored.write_columns(url, {"flow": {"camera": "number", "move": "label"}, "clip": {"vector": WIDTH}})
    return url


@pytest.fixture(scope="module")
def scores(dataset):
    """The index of all clips, in the order of the page."""
    train, val = (index.read_all(dataset, split) for split in ("train", "val"))
    return {name: np.concatenate([np.asarray(t[name]) for t in (train, val)]) for name in ("motion", "still", "label")}


@pytest.fixture(scope="module")
def server(dataset, tmp_path_factory):
    """A server whose encoder takes each text for a clip's number, and says that clip's vector."""
    model = tmp_path_factory.mktemp("encoder")
    (model / "tokenizer.json").write_text("{}")
    library = load(dataset)
    column = replace(library.shown.columns["clip"], scorer="embedding", config={"model": str(model)})
    library = replace(library, shown=replace(library.shown, columns=library.shown.columns | {"clip": column}))
    vectors = np.concatenate([part.unit for part in alike.vectors(library.dataset, column.column, "vector")])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(queries, "of_text", lambda _, words, __: vectors[int(words)].astype(np.float32))
        with browsed.serving(library, writable=True) as running:
            yield running


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    with chromium.opened(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(server.address)
        yield driver


@pytest.fixture
def page(server, browser):
    """The page as it opens; no test leaves an error of the page's own behind."""
    chromium.resize(browser, 1280, 900)
    open_page(browser, server)
    yield browser
    wrong = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not [line for line in wrong if "Failed to load resource" not in line]
    assert not browser.execute_script("return document.title").startswith("taken")


def open_page(driver, server, **state):
    """Open the page anew, with a state in its address."""
    driver.get("about:blank")
    parts = "&".join(f"{name}={quote(json.dumps(value))}" for name, value in state.items())
    driver.get(f"{server.url}/#{parts}")
    settled(driver)


def settled(driver):
    """Wait for the answer to the last question, and for the clips in sight."""
    until(
        driver,
        "!document.body.classList.contains('asking') && !document.querySelector('.card.waiting') "
        "&& (document.querySelector('.card') || !document.querySelector('#empty').hidden)",
    )


def find(driver, selector):
    return driver.find_element("css selector", selector)


def total(driver):
    settled(driver)
    return int(find(driver, "#total b").text.replace(",", ""))


def keys(driver, *pressed):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*pressed).perform()


def shown(driver):
    """The numbers of the clips that are elements."""
    script = (
        "return [...document.querySelectorAll('.card')].map(card => Number(card.dataset.index)).sort((a, b) => a - b)"
    )
    return driver.execute_script(script)


def chips(driver):
    return [chip.text.split("\n")[0] for chip in driver.find_elements("css selector", ".chip")]


def test_all_clips_scroll_by_and_few_are_elements(page):
    assert total(page) == CLIPS
    assert shown(page)[0] == 0

    for share, low, high in ((0.5, 0.49, 0.51), (1.0, 0.999, 1.0)):
        page.execute_script(
            "const grid = document.querySelector('#grid'); grid.scrollTop = arguments[0] * (grid.scrollHeight - grid.clientHeight)",
            share,
        )
        until(page, "Number(document.querySelector('.card').dataset.index) >= arguments[0]", (low - 0.001) * CLIPS)
        settled(page)
        assert low * CLIPS <= shown(page)[-1] + 1 <= high * CLIPS
        assert len(shown(page)) < 80
    assert shown(page)[-1] == CLIPS - 1

    # by the wheel each row comes into sight, whatever the height that the browser allows
    seen = set(shown(page))
    for _ in range(4):
        page.execute_script("document.querySelector('#grid').scrollBy(0, -400)")
        until(page, "Number(document.querySelector('.card').dataset.index) < arguments[0]", min(seen))
        settled(page)
        seen |= set(shown(page))
    assert seen == set(range(min(seen), CLIPS))


def test_a_scroll_is_not_undone_where_its_event_comes_late(page):
    # the page is busy until the scroll bar would be put right, and moves before it hears of the new place
    page.execute_script(
        """
        const grid = document.querySelector('#grid');
        grid.scrollTop = grid.scrollHeight / 2;
        grid.addEventListener('scroll', () => {
          const end = performance.now() + 400;
          while (performance.now() < end);
          grid.scrollTop = grid.scrollHeight;
        }, { once: true });
        """
    )
    until(page, "[...document.querySelectorAll('.card')].at(-1).dataset.index === arguments[0]", str(CLIPS - 1))


def test_a_clip_plays_under_the_pointer(page):
    from selenium.webdriver.common.action_chains import ActionChains

    cards = page.find_elements("css selector", ".card")
    for card in cards[1:3]:
        ActionChains(page).move_to_element(card).perform()
        until(page, "arguments[0].querySelector('video')?.currentTime > 0", card)
    assert len(page.find_elements("css selector", "video")) == 1


def test_keys_lead_through_the_clips_and_their_details(page):
    from selenium.webdriver.common.keys import Keys

    columns = int(find(page, "#grid").get_attribute("aria-colcount"))
    page.execute_script("document.querySelector('.card').focus()")
    keys(page, Keys.END)
    until(page, "document.activeElement.dataset.index === arguments[0]", str(CLIPS - 1))
    keys(page, Keys.HOME, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    until(page, "document.activeElement.dataset.index === arguments[0]", str(columns + 1))
    keys(page, Keys.SPACE)
    until(page, "document.activeElement.querySelector('video')?.currentTime > 0")
    settled(page)

    keys(page, Keys.ENTER)
    title = until(
        page, "!document.querySelector('#details').hidden && document.querySelector('#details h2').textContent"
    )
    keys(page, Keys.ARROW_RIGHT)
    until(page, "document.querySelector('#details h2').textContent !== arguments[0]", title)
    assert {"motion", "sharp"} <= {cell.text for cell in page.find_elements("css selector", "#details th")}
    title = find(page, "#details h2").text
    page.refresh()
    until(page, "document.querySelector('#details h2')?.textContent === arguments[0]", title)
    settled(page)
    keys(page, "g")
    until(page, "document.activeElement.dataset.index === arguments[0]", str(columns + 2))
    keys(page, Keys.ESCAPE)
    until(page, "document.querySelector('#details').hidden")
    until(page, "document.activeElement.dataset.index === arguments[0]", str(columns + 2))
    keys(page, "?")
    assert find(page, "#help").is_displayed()
    keys(page, Keys.ESCAPE, "/")
    until(page, "document.activeElement.id === 'search-words'")


def test_the_handles_of_a_histogram_are_a_rule(page, scores):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    least, most = (find(page, f"[data-field=still] .handle.{end}") for end in ("min", "max"))
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", least)
    until(page, "document.querySelector('[data-field=still] path.chosen').getAttribute('d')")
    ActionChains(page).drag_and_drop_by_offset(least, 70, 0).perform()
    until(page, "document.querySelector('.chip')")
    low = float(least.get_attribute("aria-valuenow"))
    assert 0.2 < low < 0.4
    # a clip without a value breaks no rule
    assert total(page) == np.count_nonzero(~(scores["still"] < low))

    most.send_keys(Keys.PAGE_DOWN, Keys.ARROW_LEFT)
    until(page, "document.querySelector('.chip').textContent.includes(' to ')")
    high = float(most.get_attribute("aria-valuenow"))
    within = ~(scores["still"] < low) & ~(scores["still"] > high)
    assert total(page) == np.count_nonzero(within)
    find(page, "[data-field=still] .missing").click()
    until(page, "document.querySelector('.chip').textContent.includes('there')")
    assert total(page) == np.count_nonzero(within & ~np.isnan(scores["still"]))
    find(page, "[data-field=still] .missing").click()
    until(page, "document.querySelector('.chip').textContent.includes('missing')")
    assert total(page) == np.count_nonzero(np.isnan(scores["still"]))

    find(page, "[data-field=still] .bound.max").send_keys(Keys.HOME, Keys.SHIFT, Keys.END, Keys.DELETE, Keys.ENTER)
    least.send_keys(Keys.HOME)
    find(page, "[data-field=still] .missing").click()
    until(page, "!document.querySelector('.chip')")
    assert total(page) == CLIPS


def test_labels_words_and_an_order_are_chips_of_a_link(page, scores):
    from selenium.webdriver.common.keys import Keys

    find(page, "[data-field=label] li:nth-child(1) input").click()
    until(page, "document.querySelectorAll('.chip').length === 1")
    label = find(page, "[data-field=label] li:nth-child(1) .name").text
    assert total(page) == np.count_nonzero(scores["label"] == label)
    keys(page, "/", "BLUE square")
    until(
        page,
        "document.querySelectorAll('.chip').length === 2 && document.querySelector('.chip').textContent.includes('BLUE square')",
    )
    some = total(page)
    assert 0 < some < np.count_nonzero(scores["label"] == label)
    find(page, "#sort option[value=':motion']").click()
    until(page, "document.querySelector('.card .lead')")
    settled(page)
    values = [float(lead.text) for lead in page.find_elements("css selector", ".card .lead b")]
    assert values == sorted(values, reverse=True)
    find(page, "#sort option[value=':caption']").click()
    until(page, "document.querySelector('.card') && !document.querySelector('.card .lead')")
    settled(page)
    captions = [caption.text for caption in page.find_elements("css selector", ".card .caption")]
    assert captions == sorted(captions) and len(set(captions)) > 1

    address, asked = page.current_url, chips(page)
    page.get("about:blank")
    page.get(address)
    assert total(page) == some
    assert chips(page) == asked == ["caption has “BLUE square”", f"label: {label}"]
    find(page, ".chip").click()
    until(page, "document.querySelectorAll('.chip').length === 1")
    page.back()
    until(page, "document.querySelectorAll('.chip').length === 2")
    assert total(page) == some

    find(page, "[data-field=label] .absent input").click()
    until(page, "document.querySelector('.chip:nth-child(2)').textContent.includes('label: none')")
    find(page, ".chip").click()
    until(page, "document.querySelectorAll('.chip').length === 1")
    assert total(page) == np.count_nonzero([label is None for label in scores["label"]])
    find(page, "#search-words").send_keys(Keys.CONTROL, "a")
    keys(page, "nothing is called so")
    until(page, "!document.querySelector('#empty').hidden")
    find(page, "#empty button").click()
    assert total(page) == CLIPS


def test_what_names_and_captions_say_runs_nothing(page):
    assert find(page, "#name").text == FOLDER
    assert VIEW in [name.text for name in page.find_elements("css selector", ".view h3")]
    keys(page, "/", "onerror")
    until(page, "document.querySelector('.chip')")
    assert total(page) == 1
    assert find(page, ".card .caption").text == browsed.HOSTILE
    find(page, ".card .caption").click()
    until(page, "!document.querySelector('#details').hidden")
    assert find(page, "#details blockquote p").text == browsed.HOSTILE
    assert browsed.HOSTILE in find(page, "#details .source").text
    strangers = "[...document.querySelectorAll('body script, b[onclick], img[src=\"x\"], [onerror]')].length"
    assert page.execute_script(f"return {strangers}") == 0


def test_views_say_why_a_clip_is_out_and_two_are_compared(page):
    out = find(page, ".view [aria-label='Clips by view sharp'] button:nth-child(3)")
    words = out.text
    out.click()
    until(page, "document.querySelector('.mark')?.textContent.startsWith('out: ')")
    assert f"{total(page):,}" in words
    reasons = page.find_elements("css selector", ".why option:not([value=''])")
    reason = next(one for one in reasons if one.is_displayed())
    words = reason.text
    reason.click()
    until(
        page,
        "document.querySelector('.chip').textContent.includes(' < ') || document.querySelector('.chip').textContent.includes(' > ')",
    )
    some = total(page)
    assert words == f"{find(page, '.card .mark').text.removeprefix('out: ')} ({some:,})"
    find(page, ".chip").click()
    until(page, "!document.querySelector('.chip')")

    for select, name in zip(page.find_elements("css selector", ".two select"), ("calm", "sharp"), strict=True):
        next(one for one in select.find_elements("css selector", "option") if one.text == name).click()
    until(page, "[...document.querySelectorAll('.segments.tall small')].every(one => one.textContent.match(/[0-9]/))")
    counts = [int(one.text.replace(",", "")) for one in page.find_elements("css selector", ".segments.tall small")]
    assert sum(counts) == CLIPS
    for number, button in enumerate(page.find_elements("css selector", ".segments.tall button")):
        button.click()
        until(page, "arguments[0].getAttribute('aria-pressed') === 'true'", button)
        assert total(page) == counts[number]


def test_clips_alike_a_clip_and_alike_words_come_first(page):
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.querySelector('.card[data-index=\"2\"]').focus()")
    keys(page, "a")
    until(page, "document.querySelector('.chip')?.textContent.startsWith('alike ')")
    settled(page)
    assert find(page, ".card .caption").text == "a blue square moves, number 2"
    leads = [lead.text for lead in page.find_elements("css selector", ".card .lead")]
    assert leads[0] == "alike 1"
    values = [float(lead.removeprefix("alike ")) for lead in leads if lead]
    assert values == sorted(values, reverse=True)

    page.execute_script("document.querySelector('.card[data-index=\"1\"]').click()")
    until(page, "document.querySelector('#details .alike')")
    first = find(page, "#details-title").text
    keys(page, "a")
    until(page, "document.querySelector('.chip').textContent.includes(arguments[0])", first)
    keys(page, Keys.ESCAPE)

    find(page, "#search-in option[value=text]").click()
    find(page, "#search-words").send_keys("4", Keys.ENTER)
    until(page, "document.querySelector('.chip').textContent.startsWith('looks like')")
    settled(page)
    assert find(page, ".card .caption").text == "a green square moves, number 4"
    assert len(chips(page)) == 1


def test_rules_are_saved_as_a_view(page, server, dataset, scores):
    open_page(
        page,
        server,
        rules={"motion": {"min": 0.25}, "still": {"missing": "only"}},
        labels={"flow.move": {"none": ["red"]}, "split": {"any": ["val"]}},
        has={"caption": {"text": "a"}},
    )
    find(page, "#ask-save").click()
    until(page, "document.querySelector('#save-recipe').textContent.includes('min: 0.25')")
    assert "flow.move" in find(page, "#save-recipe").text and find(page, "#save-copy").is_enabled()
    left = find(page, "#save-left").text
    assert all(words in left for words in ("caption has “a”", "split: val", "still is missing"))
    assert "split" not in find(page, "#save-recipe").text
    find(page, "#save-duplicates").click()
    name = find(page, "#save-name")
    name.clear()
    name.send_keys("chosen")
    find(page, "#save-write").click()
    until(page, "document.querySelector('#save-says').textContent.startsWith('Kept ')")
    kept = int(find(page, "#save-says").text.split()[1].replace(",", ""))
    table = view.read_view(str(Path(dataset) / "views" / "chosen.parquet"))
    assert kept == sum(table["keep"].to_pylist()) < np.count_nonzero(scores["motion"] >= 0.25)
    find(page, "#save-write").click()
    until(page, "document.querySelector('#save-says.wrong')")
    assert "chosen" in find(page, "#save-says").text
    find(page, "#save-close").click()
    assert "chosen" in [one.text for one in page.find_elements("css selector", ".view h3")]


def test_an_answer_that_the_server_forgot_is_asked_for_again(page):
    script = """const ask = n => fetch('/api/query', {method: 'POST', headers: {'Content-Type': 'application/json'},
      body: JSON.stringify({where: [{field: 'motion', min: n / 1000}]})});
    return Promise.all([...Array(100).keys()].map(ask)).then(() => true)"""
    assert page.execute_script(script)
    page.execute_script("document.querySelector('#grid').scrollTop = 1e6")
    until(page, "Number(document.querySelector('.card').dataset.index) > 1000")
    settled(page)
    assert not find(page, "#wrong").is_displayed()


def test_what_is_wrong_is_a_line(page, server):
    for state, words in (({"rules": {"sharpnes": {"min": 0}}}, "sharpnes"), ({"rules": 5}, "rules")):
        page.get("about:blank")
        page.get(f"{server.url}/#" + "&".join(f"{k}={quote(json.dumps(v))}" for k, v in state.items()))
        until(page, "!document.querySelector('#wrong').hidden")
        assert words in find(page, "#wrong").text


def test_a_phone_shows_all_of_it(page, server):
    chromium.resize(page, 390, 844)
    open_page(page, server)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    assert not find(page, "#fields").is_displayed()
    find(page, "#filters").click()
    until(page, "document.querySelector('[data-field=\"flow.camera\"] path.chosen').getAttribute('d')")
    find(page, "[data-field=split] li:nth-child(2) input").click()
    find(page, "#panel-close").click()
    assert total(page) == CLIPS // 10
    find(page, ".card .caption").click()
    until(page, "!document.querySelector('#details').hidden")
    assert find(page, "#details").size["width"] == 390
    find(page, "[aria-label='Close the details']").click()
    assert not find(page, "#details").is_displayed()


def test_every_control_has_a_name(page):
    script = """const named = one => one.ariaLabel || one.textContent.trim() || one.labels?.[0]?.textContent.trim() || one.title
      || one.getAttribute('aria-labelledby');
    return [...document.querySelectorAll('button, input, select, [role=slider], [role=grid], dialog')]
      .filter(one => !named(one)).map(one => one.outerHTML)"""
    assert page.execute_script(script) == []
