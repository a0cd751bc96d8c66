// A grid over any number of clips of which only the rows in sight are elements. Browsers end elements at some ten million
// pixels; a taller grid scrolls pixel by pixel as any other, and a dragged scroll bar moves through it in proportion.

import { clamp, make } from "./dom.js";

const TALLEST = 2_000_000;         // pixels; positions in it are exact to an eighth of one
const BLOCK = 100, BLOCKS = 60;    // clips that are asked for at once; blocks that are kept
const GAP = 10, EDGE = 12, WORDS = 62;
const REST = 160;                  // milliseconds without a scroll after which the scroll bar is put right
const WAIT = 50;                   // milliseconds that a row is in sight before its clips are asked for

// ask(from, count) -> rows    makeCard(index) -> {element, fill(row), play(), stop()}
// opened(index)               moved(index): of the first clip in sight
export function makeGrid(root, { ask, makeCard, opened, moved, failed }) {
  const spacer = make("div", { class: "spacer", role: "presentation" });
  root.append(spacer);

  let total = 0, size = 220, columns = 1, wide = 200, tall = 200;  // of a card in pixels, `tall` with the gap
  let top = 0, last = 0, whole = 0, reach = 0;                     // `top` of `whole`, by scrollTop `last` of `reach`
  let current = 0, told = 0, asking = 0, touched = false, rest, wait;
  const rows = new Map();     // number of the row: {element, cards}
  const blocks = new Map();   // number of the block: its clips, or a promise of them

  const lines = () => Math.ceil(total / columns);
  const height = () => root.clientHeight;

  function measure() {
    const inside = root.clientWidth - 2 * EDGE;
    if (inside <= 0) return;
    columns = Math.max(inside < 300 ? 1 : 2, Math.floor((inside + GAP) / (size + GAP)));
    wide = Math.floor((inside - GAP * (columns - 1)) / columns);
    tall = Math.round((wide * 9) / 16) + WORDS + GAP;
    const full = lines() * tall + 2 * EDGE - GAP;
    spacer.style.height = `${Math.min(full, TALLEST)}px`;
    whole = Math.max(0, full - height());
    reach = Math.max(0, Math.min(full, TALLEST) - height());
    root.setAttribute("aria-rowcount", lines());
    root.setAttribute("aria-colcount", columns);
  }

  // Put the scroll bar where `top` is; the rows stand still under it.
  function settle() {
    clearTimeout(rest);
    let target = whole ? (top * reach) / whole : 0;
    if (top > 0) target = Math.max(target, 1);
    if (top < whole) target = Math.min(target, reach - 1);
    if (reach < whole || Math.abs(root.scrollTop - target) >= 1) root.scrollTop = target;
    last = root.scrollTop;
    paint();
  }

  // A scroll of which the event is still to come would be undone.
  function rested() {
    if (!touched && root.scrollTop === last) settle();
  }

  function scrolled() {
    const now = root.scrollTop, delta = now - last;
    last = now;
    if (reach >= whole) top = now;
    else if (Math.abs(delta) > 2 * height()) top = reach ? (now * whole) / reach : 0;
    else top += delta;
    top = clamp(top, 0, whole);
    const stuck = (now <= 0 && top > 0) || (now >= reach && top < whole);
    if (reach < whole) {
      clearTimeout(rest);
      if (stuck && !touched) return settle();
      rest = setTimeout(rested, REST);
    }
    paint();
  }

  function paint() {
    const from = clamp(Math.floor((top - EDGE) / tall) - 1, 0, Math.max(0, lines() - 1));
    const to = Math.min(lines() - 1, Math.ceil((top + height()) / tall) + 1);
    for (const [line, { element }] of rows) if (line < from || line > to) drop(line, element);
    for (let line = to; line >= from; line--) {
      if (!rows.has(line)) rows.set(line, makeRow(line));
      const { element } = rows.get(line);
      element.style.transform = `translateY(${last + EDGE + line * tall - top}px)`;
    }
    clearTimeout(wait);
    wait = setTimeout(need, WAIT);
    if (first() !== told) moved((told = first()));
  }

  // the first row of which at least half is in sight
  const first = () => Math.min(Math.max(0, total - 1), Math.max(0, Math.round((top - EDGE) / tall)) * columns);

  function drop(line, element) {
    if (element.contains(document.activeElement)) root.focus({ preventScroll: true });
    for (const card of rows.get(line).cards) card.stop(true);
    element.remove();
    rows.delete(line);
  }

  function makeRow(line) {
    const element = make("div", { class: "row", role: "row", "aria-rowindex": line + 1 });
    const cards = [];
    for (let index = line * columns; index < Math.min(total, (line + 1) * columns); index++) {
      const card = makeCard(index);
      card.element.setAttribute("aria-colindex", index - line * columns + 1);
      card.element.tabIndex = index === current ? 0 : -1;
      card.element.style.width = `${wide}px`;
      card.element.style.setProperty("--picture", `${tall - WORDS - GAP}px`);
      element.append(card.element);
      cards.push(card);
      const row = held(index);
      if (row) card.fill(row);
    }
    spacer.insertBefore(element, rows.get(line + 1)?.element ?? null);
    return { element, cards };
  }

  function held(index) {
    const block = blocks.get(Math.floor(index / BLOCK));
    return Array.isArray(block) ? block[index % BLOCK] : undefined;
  }

  // Ask for the clips in sight that are not here.
  async function need() {
    if (!rows.size) return;
    const shown = [...rows.keys()].sort((a, b) => a - b);
    const from = Math.floor((shown[0] * columns) / BLOCK);
    const to = Math.floor(Math.min(total - 1, (shown[shown.length - 1] + 1) * columns - 1) / BLOCK);
    const waits = [];
    for (let number = from; number <= to; number++) waits.push(block(number));
    await Promise.all(waits);
  }

  async function block(number) {
    if (blocks.has(number)) {
      const present = blocks.get(number);
      blocks.delete(number);
      blocks.set(number, present);  // the last used is the last to go
      return present;
    }
    const round = asking;
    const promise = ask(number * BLOCK, Math.min(BLOCK, total - number * BLOCK));
    blocks.set(number, promise);
    try {
      const answer = await promise;
      if (round !== asking) return [];
      blocks.set(number, answer);
      for (const old of blocks.keys()) if (blocks.size > BLOCKS && old !== number) blocks.delete(old);
      for (const { cards } of rows.values()) {
        for (const card of cards) if (Math.floor(card.index / BLOCK) === number) card.fill(answer[card.index % BLOCK]);
      }
      return answer;
    } catch (error) {
      if (round === asking) {
        blocks.delete(number);
        failed(error);
      }
      return [];
    }
  }

  function clear() {
    for (const [line, { element }] of rows) drop(line, element);
  }

  function goTo(index) {
    measure();
    top = clamp(Math.floor(index / columns) * tall, 0, whole);
    settle();
  }

  // Lay the cards out anew round the one that has the focus, or the first in sight.
  function again() {
    const focused = root.contains(document.activeElement);
    const index = first(), inSight = card(current) !== undefined;
    clear();
    goTo(index);
    if (inSight) reveal(current);
    if (focused) card(current)?.element.focus({ preventScroll: true });
  }

  function reveal(index) {
    const above = EDGE + Math.floor(index / columns) * tall;
    if (above - GAP < top) top = clamp(above - EDGE, 0, whole);
    else if (above + tall > top + height()) top = clamp(above + tall - height(), 0, whole);
    settle();
  }

  const card = (index) => rows.get(Math.floor(index / columns))?.cards[index % columns];

  function select(index, focus = true) {
    if (!total) return;
    card(current)?.element.setAttribute("tabindex", "-1");
    current = clamp(index, 0, total - 1);
    reveal(current);
    const one = card(current)?.element;
    one?.setAttribute("tabindex", "0");
    if (focus) one?.focus({ preventScroll: true });
  }

  root.addEventListener("scroll", scrolled, { passive: true });
  root.addEventListener("touchstart", () => (touched = true), { passive: true });
  for (const end of ["touchend", "touchcancel"]) {
    root.addEventListener(end, () => {
      touched = false;
      clearTimeout(rest);
      rest = setTimeout(rested, REST * 3);
    }, { passive: true });
  }
  root.addEventListener("focusin", (event) => {
    const index = Number(event.target.closest?.(".card")?.dataset.index ?? NaN);
    if (!Number.isNaN(index) && index !== current) {
      card(current)?.element.setAttribute("tabindex", "-1");
      current = index;
      card(current).element.setAttribute("tabindex", "0");
    }
  });
  root.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("button")) return;
    const page = Math.max(1, Math.floor(height() / tall)) * columns;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -page, PageDown: page,
      Home: -Infinity, End: Infinity };
    if (event.key in moves) select(current + moves[event.key]);
    else if (event.key === "Enter") opened(current);
    else return;
    event.preventDefault();
  });
  new ResizeObserver(() => {
    if (total) again();
  }).observe(root);

  return {
    // Show another query's clips; returns when those in sight are here.
    async show(clips, from = 0) {
      asking++;
      blocks.clear();
      clear();
      total = clips;
      current = clamp(from, 0, Math.max(0, total - 1));
      if (!total) {
        spacer.style.height = "0px";
        top = last = root.scrollTop = 0;
        return;
      }
      goTo(from);
      clearTimeout(wait);
      await need();
    },
    resize(pixels) {
      if (pixels === size) return;
      size = pixels;
      if (total) again();
    },
    select,
    goTo,
    focus: () => card(current)?.element.focus({ preventScroll: true }),
    index: () => current,
    total: () => total,
    row: async (index) => held(index) ?? (await block(Math.floor(index / BLOCK)))[index % BLOCK],
  };
}
