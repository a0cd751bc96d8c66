// The page: it holds the state, asks the server, and has the parts show the answer.

import * as api from "./api.js";
import { makeCards } from "./cards.js";
import { makeDetails } from "./details.js";
import { count, find, make } from "./dom.js";
import { makeGrid } from "./grid.js";
import { makePanel } from "./panel.js";
import { makeSaving } from "./saving.js";
import { makeSearch } from "./search.js";
import { hold } from "./stills.js";
import { asked, nothing, put, question, read, write } from "./state.js";

const DRAGGING = 60, MOVING = 400, ONE_CHANGE = 2000;  // milliseconds
const NARROW = matchMedia("(max-width: 900px)"), PHONE = matchMedia("(max-width: 700px)");  // as in page.css
const THEMES = { auto: "◐", light: "○", dark: "●" };

let dataset, panel, details, search, state = nothing();
let answer = { query: null, total: 0 }, dirty = false, running = null, since = 0;
let last = { name: null, time: 0 };  // change

// ---- what is wrong, in a line

function wrong(error) {
  if (error?.name === "AbortError") return;
  find("#wrong span").textContent = error.message ?? String(error);
  find("#wrong").hidden = false;
}

function fine() {
  find("#wrong").hidden = true;
}

// ---- the state and its address

function remember(push) {
  const address = `#${write(state)}`;
  if (address === (location.hash || "#")) return;
  history[push ? "pushState" : "replaceState"](null, "", address === "#" ? location.pathname + location.search : address);
}

// A change is a function from the state to the next one. `live`: more of it is to follow at once. Changes of one `name` that
// follow each other, such as the steps of a handle, are one for Back.
function change(update, live = false, name = null) {
  const before = JSON.stringify(question(state));
  const next = update(state);
  const same = JSON.stringify(question(next)) === before;
  state = same ? next : { ...next, at: 0 };
  const now = performance.now(), more = name !== null && name === last.name && now - last.time < ONE_CHANGE;
  last = { name, time: now };
  remember(!more);
  show();
  if (!same) ask(live ? DRAGGING : 0);
}

function show() {
  panel.rules(state);
  chips();
  find("#sort").options[0].textContent = state.alike || state.text ? "most alike first" : "as in the shards";
  find("#sort").value = state.sort ? `:${state.sort.field}` : "";
  const direction = find("#direction"), down = Boolean(state.sort?.descending);
  direction.textContent = down ? "↓" : "↑";
  direction.title = direction.ariaLabel = down ? "Largest first; turn round" : "Smallest first; turn round";
  direction.hidden = !state.sort;
  search.show(state);
}

function chips() {
  const list = asked(state).map(({ words, without }) =>
    make("button", { type: "button", class: "chip", title: "Take this rule away", "aria-label": `${words}; take away`,
      onclick: () => change(() => without) }, make("span", {}, words), make("span", { "aria-hidden": "true" }, "✕")));
  if (list.length > 1) {
    list.push(make("button", { type: "button", class: "quiet", onclick: clear }, "Take all away"));
  }
  const inside = find("#chips").contains(document.activeElement);
  find("#chips").replaceChildren(...list);
  find("#chips").hidden = !list.length;
  if (inside) (list[0] ?? find("#grid")).focus();
}

const clear = () => change((before) => ({ ...nothing(), sort: before.sort }));

// ---- asking: one question at a time, the last one wins

function ask(after = 0) {
  if (!dirty) since = performance.now();
  dirty = true;
  running ??= work(after).finally(() => (running = null));
  return running;
}

async function work(after) {
  document.body.classList.add("asking");
  hold(true);
  while (dirty) {
    if (after) await new Promise((done) => setTimeout(done, after));
    dirty = false;
    const started = since;
    try {
      answer = await api.query(question(state));
      fine();
      await shown(started);
    } catch (error) {
      wrong(error);
    }
  }
  document.body.classList.remove("asking");
  hold(false);
}

async function shown(started) {
  const { total, milliseconds } = answer;
  find("#total").replaceChildren(make("b", {}, count(total)), total === dataset.clips ? " clips" : ` of ${count(dataset.clips)} clips`,
    make("small", {}, `${Math.round(milliseconds)} ms`));
  find("#empty").hidden = total > 0;
  find("#empty p").textContent = asked(state).length ? "No clip passes all of the rules." : "The dataset has no clips.";
  find("#empty button").hidden = !asked(state).length;
  await grid.show(total, Math.min(state.at, Math.max(0, total - 1)));
  await new Promise(requestAnimationFrame);
  performance.measure("longtake.filter", { start: started, end: performance.now() });
  panel.asked();
}

// The server remembers some answers: one that it forgot is asked for again.
async function remembered(request) {
  const { query } = answer;
  try {
    return await request(query);
  } catch (error) {
    if (error.status !== 404 && error.status !== 410) throw error;
    const again = await api.query(question(state));
    if (answer.query === query) answer = again;
    return request(again.query);
  }
}

// ---- the grid

const alike = (row) => alike.possible() && near(row.key, dataset.alike.includes(state.alike?.column) ? state.alike.column : dataset.alike[0]);
alike.possible = () => dataset.alike.length > 0;

const near = (key, column) => change((before) => ({ ...before, alike: { key, column }, text: null, sort: null }));

function out(row) {
  const named = [...Object.keys(state.views), ...(state.compare ? [state.compare.one, state.compare.other] : [])];
  const lines = named.filter((view) => row.reasons?.[view] != null).map((view) =>
    named.length > 1 ? `out of ${view}: ${row.reasons[view]}` : `out: ${row.reasons[view]}`);
  return lines.length ? [...new Set(lines)].join(" · ") : null;
}

// the card says the caption itself
const lead = () => (state.sort?.field === "caption" ? undefined : state.sort?.field);

let moving;
const grid = makeGrid(find("#grid"), {
  ask: async (from, number) => (await remembered((query) => api.rows(query, from, number))).rows,
  makeCard: makeCards({ open: (index) => open(index), alike, lead, out }),
  opened: (index) => open(index),
  moved(index) {
    clearTimeout(moving);
    moving = setTimeout(() => {
      // while a clip is open its own place is kept
      if (dirty || running || state.clip !== null || index === state.at) return;
      state = { ...state, at: index };
      remember(false);
    }, MOVING);
  },
  failed: wrong,
});

// ---- the details

async function open(index) {
  try {
    const row = await grid.row(index);
    if (!row) return;
    grid.select(index, false);
    state = { ...state, clip: row.key, at: index };
    remember(false);
    await detail(true);
  } catch (error) {
    wrong(error);
  }
}

async function detail(focus) {
  const key = state.clip, aside = find("#details");
  if (key === null) {
    const inside = aside.contains(document.activeElement);
    aside.hidden = true;
    details.clear();
    document.body.classList.remove("detailed");
    cover();
    if (inside) grid.focus();
    return;
  }
  const clip = await api.clip(key);
  if (state.clip !== key) return;
  const was = aside.hidden;
  aside.hidden = false;
  document.body.classList.add("detailed");
  cover();
  details.show(clip);
  if (focus && was) details.focus();
}

function close() {
  state = { ...state, clip: null };
  remember(false);
  detail();
}

// ---- the bar

function makeBar() {
  find("#name").textContent = dataset.name;
  document.title = `${dataset.name} · Longtake`;
  find("#sort").replaceChildren(make("option", { value: "" }, "as in the shards"),
    ...dataset.fields.map(({ name }) => make("option", { value: `:${name}` }, `by ${name}`)));
  find("#sort").addEventListener("change", (event) => {
    const field = event.target.value.slice(1);
    const numbers = dataset.fields.some((one) => one.name === field && one.kind === "number");
    change((before) => ({ ...before, sort: field ? { field, descending: numbers } : null }));
  });
  find("#direction").addEventListener("click", () =>
    change((before) => ({ ...before, sort: before.sort && { ...before.sort, descending: !before.sort.descending } })));

  const size = find("#size");
  size.value = kept("size", PHONE.matches ? "160" : "220");
  grid.resize(Number(size.value));
  size.addEventListener("input", () => {
    grid.resize(Number(size.value));
    keep("size", size.value);
  });

  const dress = (theme) => {
    document.documentElement.dataset.theme = theme;
    find("#theme").textContent = THEMES[theme];
    find("#theme").title = find("#theme").ariaLabel = `Colours: ${theme}`;
    keep("theme", theme);
  };
  dress(Object.hasOwn(THEMES, kept("theme", "auto")) ? kept("theme", "auto") : "auto");
  find("#theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    dress(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
  });

  const panels = (open) => {
    document.body.classList.toggle("filtering", open);
    find("#filters").setAttribute("aria-expanded", String(open));
    cover();
    find(open ? "#panel-close" : "#filters").focus();
  };
  for (const width of [NARROW, PHONE]) width.addEventListener("change", cover);
  find("#filters").addEventListener("click", () => panels(!document.body.classList.contains("filtering")));
  find("#panel-close").addEventListener("click", () => panels(false));
  find("#wrong button").addEventListener("click", fine);
  find("#empty button").addEventListener("click", clear);
  find("#ask-help").addEventListener("click", () => find("#help").showModal());
}

// On a small screen the rules and the details lie over all else, which then takes no focus.
function cover() {
  const rules = NARROW.matches && document.body.classList.contains("filtering"), clip = PHONE.matches && state.clip !== null;
  for (const part of ["#bar", "#chips", "main"]) find(part).inert = rules || clip;
  find("#panel").inert = clip;
}

// a browser may refuse to keep anything
function kept(name, otherwise) {
  try {
    return localStorage.getItem(`longtake.${name}`) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function keep(name, value) {
  try {
    localStorage.setItem(`longtake.${name}`, value);
  } catch {
    // then it is asked again
  }
}

// ---- keys

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || find("dialog[open]")) return;
  const typing = event.target.matches("input:not([type=checkbox], [type=range]), textarea, select");
  if (event.key === "Escape") {
    if (typing || event.target.closest("#search")) grid.focus();
    else if (document.body.classList.contains("filtering")) find("#panel-close").click();
    else if (state.clip !== null) close();
    else return;
  } else if (typing) return;
  else if (event.key === "/") find("#search-words").focus();
  else if (event.key === "?") find("#help").showModal();
  else if (event.key === "g") grid.focus();
  else if (event.key === "s") find("#ask-save").click();
  else return;
  event.preventDefault();
}

// ---- the beginning

function load() {
  try {
    state = read(location.hash);
  } catch (error) {
    state = nothing();
    wrong(new Error(`${error.message} Everything is shown instead.`));
    return false;
  }
  return true;
}

function makeRules() {
  panel = makePanel(find("#fields"), dataset, {
    change,
    histogram: (field) => remembered((query) => api.histogram(query, field)),
    compared: async (one, other, side) => (await api.query({ where: [{ compare: [one, other], side }] })).total,
    failed: wrong,
  });
}

function makeClip() {
  details = makeDetails(find("#details"), dataset, {
    step: (by) => {
      const index = grid.index() + by;
      if (index >= 0 && index < grid.total()) open(index);
    },
    close,
    alike: near,
    only: (field, label) => change((before) => put(before, "labels", field, { any: [label] })),
  });
}

async function start() {
  try {
    dataset = await api.dataset();
  } catch (error) {
    return wrong(error);
  }
  const understood = load();
  makeRules();
  makeClip();
  makeBar();
  search = makeSearch(dataset, state, change);
  const saving = makeSaving(dataset, api, { state: () => state, saved: async () => {
    Object.assign(dataset, await api.dataset());
    makeRules();
    show();
    panel.asked();
  } });
  find("#ask-save").addEventListener("click", saving.open);
  document.addEventListener("keydown", keys);
  window.addEventListener("popstate", () => {
    load();
    show();
    ask();
    detail().catch(wrong);
  });
  show();
  const line = find("#wrong span").textContent;
  await ask();
  if (!understood) wrong(new Error(line));
  if (state.clip !== null) detail().catch(wrong);
}

start();
