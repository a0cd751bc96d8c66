// A histogram whose two handles are a rule: the least and the most of a field. Handles move by pointer and by keys.

import { clamp, count, draw, make, number, rounded, step } from "./dom.js";

const WIDTH = 240, HEIGHT = 44;

// What becomes of clips without a value, and what a press makes of it.
const MISSING = {
  undefined: { next: "drop", words: "they pass; drop them" },
  drop: { next: "only", words: "they are dropped; show only them" },
  only: { next: undefined, words: "only they are shown; show all" },
};

// Steep fields have a few full bins and many nearly empty ones: heights are square roots of the counts.
const height = (clips, most) => (clips ? Math.max(1, Math.sqrt(clips / most) * HEIGHT) : 0);

function bars(counts, most) {
  const wide = WIDTH / counts.length;
  return counts
    .map((clips, bin) => clips && `M${bin * wide} ${HEIGHT}v${-height(clips, most)}h${wide - 0.6}V${HEIGHT}z`)
    .filter(Boolean)
    .join("");
}

// `changed(rule or null, live)` is called at each move; live: the pointer still holds the handle.
export function makeHistogram(field, { changed }) {
  let low = field.low ?? 0, high = field.high ?? 1, by = step(low, high), absent = field.missing ?? 0, rule = {}, last = null;

  const all = draw("path", { class: "all" });
  const chosen = draw("path", { class: "chosen" });
  const picture = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const shades = [make("i", { class: "shade" }), make("i", { class: "shade" })];
  const missing = make("button", {
    type: "button", class: "missing", hidden: true,
    onclick: () => {
      rule = { ...rule, missing: MISSING[rule.missing].next };
      paint();
      changed(current(), false);
    },
  });
  picture.append(all, chosen);

  const handles = ["min", "max"].map((end) => handle(end));
  const inputs = ["min", "max"].map((end) =>
    make("input", {
      type: "text", inputmode: "decimal", class: `bound ${end}`, size: 7, autocomplete: "off",
      "aria-label": `${end === "min" ? "Least" : "Most"} ${field.name}, exactly`,
      onchange: (event) => {
        const typed = event.target.value.trim();
        const value = typed === "" ? undefined : Number(typed.replace(",", "."));
        if (Number.isNaN(value)) return paint();
        set(end, value, false);
      },
    }),
  );
  const read = make("span", { class: "read", "aria-hidden": "true", hidden: true });
  const plot = make("div", {
    class: "plot",
    // a press beside the handles takes the nearer one; a finger may mean to scroll
    onpointerdown: (event) => {
      if (event.button || event.pointerType === "touch" || event.target.closest(".handle")) return;
      const value = under(event).value;
      hold(handles[Math.abs(value - at("min")) <= Math.abs(value - at("max")) ? 0 : 1], event);
    },
    onpointermove: (event) => {
      const { bin } = under(event);
      read.hidden = !last || event.pointerType === "touch";
      if (!last) return;
      const [from, to] = [last.edges[bin], last.edges[bin + 1]].map((edge) => number(rounded(edge, by)));
      const [chosen, all] = [last.chosen[bin], last.all[bin]];
      read.textContent = `${from} to ${to}: ${chosen === all ? count(all) : `${count(chosen)} of ${count(all)}`}`;
    },
    onpointerleave: () => (read.hidden = true),
  }, picture, ...shades, ...handles, read);
  const element = make("div", { class: "histogram" }, plot, make("div", { class: "bounds" }, inputs[0], missing, inputs[1]));

  // Where the pointer is: its share of the width, the value and the bin there.
  function under(event) {
    const box = plot.getBoundingClientRect();
    const share = clamp((event.clientX - box.left) / box.width, 0, 1), bins = last?.all.length ?? 1;
    return { share, value: low + share * (high - low), bin: Math.min(bins - 1, Math.floor(share * bins)) };
  }

  function hold(one, event) {
    one.setPointerCapture(event.pointerId);
    one.focus({ preventScroll: true });
    one.classList.add("held");
    event.preventDefault();
    drag(one, event);
  }

  function drag(one, event) {
    const end = one === handles[0] ? "min" : "max", { share, value } = under(event);
    const open = end === "min" ? share === 0 : share === 1;
    set(end, open ? undefined : value, true);
  }

  function handle(end) {
    const element = make("div", {
      class: `handle ${end}`, role: "slider", tabindex: 0, "aria-orientation": "horizontal",
      "aria-label": `${end === "min" ? "Least" : "Most"} ${field.name}`,
      onkeydown: (event) => {
        const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -20, PageUp: 20 };
        const open = end === "min" ? "Home" : "End";
        if (event.key in moves) set(end, at(end) + moves[event.key] * by, false);
        else if (event.key === open || event.key === "Delete") set(end, undefined, false);
        else return;
        event.preventDefault();
        event.stopPropagation();
      },
      onpointerdown: (event) => event.button || hold(element, event),
      onpointermove: (event) => element.hasPointerCapture(event.pointerId) && drag(element, event),
      onlostpointercapture: () => {
        element.classList.remove("held");
        changed(current(), false);
      },
      ondblclick: () => set(end, undefined, false),
    });
    return element;
  }

  const at = (end) => rule[end] ?? (end === "min" ? low : high);

  const current = () => (Object.values(rule).every((value) => value === undefined) ? null : { ...rule });

  function set(end, value, live) {
    let next = value === undefined ? undefined : rounded(value, by);
    if (next !== undefined && end === "min" && rule.max !== undefined) next = Math.min(next, rule.max);
    if (next !== undefined && end === "max" && rule.min !== undefined) next = Math.max(next, rule.min);
    // beyond the last value a bound says nothing
    if (next !== undefined && (end === "min" ? next <= low && value <= low : next >= high && value >= high)) next = undefined;
    if (next === rule[end]) return paint();
    rule = { ...rule, [end]: next };
    paint();
    changed(current(), live);
  }

  function paint() {
    const share = (value) => (high > low ? clamp((value - low) / (high - low), 0, 1) : 0);
    const from = share(at("min")), to = high > low ? share(at("max")) : 1;
    handles.forEach((one, i) => {
      const end = i ? "max" : "min", value = at(end);
      one.style.left = `${100 * (i ? to : from)}%`;
      one.setAttribute("aria-valuemin", low);
      one.setAttribute("aria-valuemax", high);
      one.setAttribute("aria-valuenow", clamp(value, low, high));
      one.setAttribute("aria-valuetext", rule[end] === undefined ? `${number(value)}, no rule` : number(value));
      one.style.zIndex = !i && from > 0.5 ? 2 : "";  // of two handles in one place that one that can move
      one.classList.toggle("set", rule[end] !== undefined);
      inputs[i].value = rule[end] === undefined ? "" : String(rule[end]);
      inputs[i].placeholder = number(rounded(i ? high : low, by));
    });
    missing.hidden = !absent;
    const { words } = MISSING[rule.missing];
    missing.textContent = `${rule.missing === "only" ? "only " : ""}${count(absent)} without`;
    missing.title = missing.ariaLabel = `${count(absent)} without ${field.name}: ${words}`;
    missing.setAttribute("aria-pressed", String(Boolean(rule.missing)));
    missing.classList.toggle("dropped", rule.missing === "drop");
    shades[0].style.width = `${100 * from}%`;
    shades[1].style.width = `${100 * (1 - to)}%`;
  }

  paint();
  return {
    element,
    rule(value) {
      if (handles.some((one) => one.classList.contains("held"))) return;
      rule = { min: value?.min, max: value?.max, missing: value?.missing };
      paint();
    },
    counts(answer) {
      const edges = answer.edges ?? [];
      if (edges.length > 1) [low, high] = [edges[0], edges[edges.length - 1]];
      by = step(low, high);
      const most = Math.max(1, ...answer.all);
      all.setAttribute("d", bars(answer.all, most));
      chosen.setAttribute("d", bars(answer.chosen, most));
      absent = answer.missing ?? 0;
      last = answer;
      paint();
    },
  };
}
