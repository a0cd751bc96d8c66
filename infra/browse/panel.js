// The rules: views, their comparison, and every field with its histogram or its labels.

import { makeHistogram } from "./histogram.js";
import { count, make, number } from "./dom.js";
import { SIDES, put } from "./state.js";

const FIRST = 8;  // labels that are listed before one asks for all

// `change(update, live)` applies a function to the state. `histogram(field)` answers for the clips that are shown.
export function makePanel(root, dataset, { change, histogram, failed, compared }) {
  const parts = [];      // each {rule(state)}
  const spreads = [];    // each {field, element, counts(answer), round}
  let round = 0, busy = false;

  const views = dataset.views.length ? [group("Views", dataset.views.map(view), "views")] : [];
  if (dataset.views.length > 1) views.push(group("Compare two views", [compare()], "compare"));
  const groups = new Map();
  for (const field of dataset.fields) {
    const element = field.kind === "number" ? numbers(field) : field.kind === "label" ? labels(field) : null;
    if (!element) continue;
    const name = field.name.includes(".") ? field.name.slice(0, field.name.indexOf(".")) : "clip";
    groups.set(name, [...(groups.get(name) ?? []), element]);
  }
  // what a scorer gave before what every dataset has
  const ordered = [...groups].sort(([one], [other]) => (one === "clip") - (other === "clip"));
  const search = make("input", {
    type: "search", class: "which", placeholder: "Find a score", "aria-label": "Find a score by its name",
    oninput: () => narrow(search.value.trim().toLowerCase()),
  });
  const many = dataset.fields.length > 8;
  root.replaceChildren(...views, many ? search : "", ...ordered.map(([name, elements]) => group(name, elements)));

  // Histograms are asked for as they come into sight, one at a time.
  const sight = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) target.dataset.sight = isIntersecting ? "yes" : "";
    refresh();
  }, { root, rootMargin: "120px" });
  for (const { element } of spreads) sight.observe(element);

  async function refresh() {
    if (busy || !round) return;
    busy = true;
    try {
      for (let next; (next = spreads.find((one) => one.round !== round && one.element.dataset.sight)); ) {
        next.round = round;
        const asked = round;
        const answer = await histogram(next.field);
        if (asked === round) next.counts(answer);
        else next.round = 0;
      }
    } catch (error) {
      failed(error);
    } finally {
      busy = false;
    }
  }

  function group(title, elements) {
    return make("details", { class: "group", open: true }, make("summary", {}, make("h2", {}, title)), ...elements);
  }

  function heading(field) {
    return make("h3", { title: field.meaning || null }, field.name);
  }

  // A number that is the same for all clips has nothing to choose by, unless some have none.
  function flat(field) {
    const words = field.low == null ? "no clip has a value" : `always ${number(field.low)}`;
    return make("section", { class: "field flat", "data-field": field.name }, heading(field), make("span", {}, words));
  }

  function numbers(field) {
    if (!(field.low < field.high) && !(field.low != null && field.missing)) return flat(field);
    const plot = makeHistogram(field, {
      changed: (rule, live) => change((state) => put(state, "rules", field.name, rule), live, field.name),
    });
    const element = make("section", { class: "field", "data-field": field.name }, heading(field), plot.element);
    parts.push({ rule: (state) => {
      plot.rule(state.rules[field.name]);
      element.classList.toggle("set", Object.hasOwn(state.rules, field.name));
    } });
    spreads.push({ field: field.name, element, counts: plot.counts, round: 0 });
    return element;
  }

  function labels(field) {
    const rows = new Map();
    const list = make("ul", {});
    const element = make("section", { class: "field", "data-field": field.name }, heading(field), list);
    let rule = {};

    const set = (name, value, on) => {
      const without = (rule[name] ?? []).filter((one) => one !== value);
      const next = { ...rule, missing: undefined, [name]: on ? [...without, value] : without };
      // a label is either asked for or never wanted
      const other = name === "any" ? "none" : "any";
      if (on && next[other]) next[other] = next[other].filter((one) => one !== value);
      for (const key of Object.keys(next)) if (!next[key]?.length) delete next[key];
      change((state) => put(state, "labels", field.name, Object.keys(next).length ? next : null));
    };
    const all = field.labels ?? [];
    all.forEach(({ value, count: clips }, i) => {
      const box = make("input", { type: "checkbox", onchange: (event) => set("any", value, event.target.checked) });
      const never = make("button", {
        type: "button", class: "never", title: `Not ${value}`, "aria-label": `${field.name}: not ${value}`, "aria-pressed": "false",
        onclick: () => set("none", value, never.getAttribute("aria-pressed") !== "true"),
      }, "not");
      const number = make("span", { class: "count" }, count(clips));
      const row = make("li", { hidden: i >= FIRST }, make("label", {}, box, make("span", { class: "name" }, value)), never, number);
      rows.set(value, { row, box, never, number, clips });
      list.append(row);
    });
    const absent = make("input", { type: "checkbox",
      onchange: (event) => change((state) => put(state, "labels", field.name, event.target.checked ? { missing: "only" } : null)) });
    const lacking = make("span", { class: "count" }, count(field.missing ?? 0));
    if (field.missing) list.append(make("li", { class: "absent" }, make("label", {}, absent, make("span", { class: "name" }, "none")), lacking));
    if (all.length > FIRST) {
      const more = make("button", { type: "button", class: "more", onclick: () => {
        for (const { row } of rows.values()) row.hidden = false;
        more.remove();
      } }, `All ${count(all.length)}`);
      element.append(more);
    }
    parts.push({ rule: (state) => {
      rule = state.labels[field.name] ?? {};
      element.classList.toggle("set", Object.hasOwn(state.labels, field.name));
      absent.checked = rule.missing === "only";
      for (const [value, { row, box, never }] of rows) {
        box.checked = Boolean(rule.any?.includes(value));
        const not = Boolean(rule.none?.includes(value));
        never.setAttribute("aria-pressed", String(not));
        row.classList.toggle("not", not);
        if (box.checked || not) row.hidden = false;
      }
    } });
    spreads.push({ field: field.name, element, round: 0, counts: (answer) => {
      for (const { value, chosen } of answer.labels ?? []) {
        const row = rows.get(value);
        if (row) row.number.textContent = chosen === row.clips ? count(chosen) : `${count(chosen)} of ${count(row.clips)}`;
      }
      const { missing = 0, missing_chosen: left = 0 } = answer;
      lacking.textContent = left === missing ? count(missing) : `${count(left)} of ${count(missing)}`;
    } });
    return element;
  }

  function view({ name, uri, kept, reasons }) {
    const set = (rule) => change((state) => put(state, "views", name, rule));
    const choices = [["any", null, dataset.clips], ["in", { keep: true }, kept], ["out", { keep: false }, dataset.clips - kept]];
    const buttons = choices.map(([words, rule, clips]) =>
      make("button", { type: "button", "aria-pressed": "false", onclick: () => set(rule) }, words, make("small", {}, count(clips))),
    );
    const why = make("select", {
      class: "why", "aria-label": `Why clips are out of ${name}`, hidden: true,
      onchange: (event) => set(event.target.value === "" ? { keep: false } : { keep: false, reason: event.target.value.slice(1) }),
    }, make("option", { value: "" }, "for any reason"),
    ...reasons.map(({ value, count: clips }) => make("option", { value: `:${value}` }, `${value} (${count(clips)})`)));
    const element = make("section", { class: "field view" }, make("h3", { title: uri }, name),
      make("div", { class: "segments", role: "group", "aria-label": `Clips by view ${name}` }, ...buttons), why);
    parts.push({ rule: (state) => {
      const rule = state.views[name];
      const chosen = rule ? (rule.keep ? 1 : 2) : 0;
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === chosen)));
      why.hidden = chosen !== 2;
      why.value = rule?.reason === undefined ? "" : `:${rule.reason}`;
      element.classList.toggle("set", Boolean(rule));
    } });
    return element;
  }

  function compare() {
    const names = dataset.views.map((one) => one.name);
    const select = (words) => make("select", { "aria-label": words, onchange: () => set(null) },
      make("option", { value: "" }, "–"), ...names.map((name) => make("option", { value: name }, name)));
    const one = select("The one view"), other = select("The other view");
    const sides = SIDES.map((side) => make("button", { type: "button", "aria-pressed": "false", onclick: () => set(side) }, side));
    const table = make("div", { class: "segments tall", role: "group", "aria-label": "Clips by both views", hidden: true }, ...sides);
    let shown = null;

    function set(side) {
      const next = one.value && other.value && one.value !== other.value
        ? { one: one.value, other: other.value, side: side ?? shown?.side ?? "one" } : null;
      if (next || shown) change((state) => ({ ...state, compare: next }));
    }

    async function counts({ one, other }) {
      const words = { one: `only ${one}`, both: "both", other: `only ${other}`, neither: "neither" };
      sides.forEach((button, i) => button.replaceChildren(words[SIDES[i]], make("small", {}, "…")));
      try {
        const totals = await Promise.all(SIDES.map((side) => compared(one, other, side)));
        sides.forEach((button, i) => (button.querySelector("small").textContent = count(totals[i])));
      } catch (error) {
        failed(error);
      }
    }

    parts.push({ rule: (state) => {
      const next = state.compare;
      if (next && (next.one !== shown?.one || next.other !== shown?.other)) counts(next);
      // half a choice stays while the other half is made
      if (next) [one.value, other.value] = [next.one, next.other];
      else if (shown) one.value = other.value = "";
      shown = next;
      table.hidden = !next;
      sides.forEach((button, i) => button.setAttribute("aria-pressed", String(SIDES[i] === next?.side)));
    } });
    return make("section", { class: "field" }, make("div", { class: "two" }, one, other), table);
  }

  function narrow(words) {
    for (const section of root.querySelectorAll("[data-field]")) {
      section.hidden = words !== "" && !section.dataset.field.toLowerCase().includes(words);
    }
    for (const details of root.querySelectorAll(".group")) {
      const fields = [...details.querySelectorAll("[data-field]")];
      if (fields.length) details.hidden = fields.every((field) => field.hidden);
    }
  }

  return {
    rules: (state) => parts.forEach((part) => part.rule(state)),
    // The clips that are shown have changed.
    asked() {
      round++;
      refresh();
    },
  };
}
