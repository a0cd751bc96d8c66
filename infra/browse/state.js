// What is asked, as plain data: to and from the URL's fragment, to a query, to words, to the rules of a view.
//
// rules    {field: {min, max, missing}}        labels  {field: {any: [label], none: [label], missing}}
// has      {field: {text, regex}}              views   {view: {keep, reason}}
// compare  {one, other, side} or null          sort    {field, descending} or null
// alike    {key, column} or null               text    {words, column} or null
// clip     the key of the clip whose details are open, or null
// at       the number of the first clip in sight

import { number } from "./dom.js";

export const SIDES = ["one", "both", "other", "neither"];

export const nothing = () => ({
  rules: {}, labels: {}, has: {}, views: {}, compare: null, sort: null, alike: null, text: null, clip: null, at: 0,
});

const text = (value) => typeof value === "string";
const flag = (value) => value === undefined || typeof value === "boolean";
const bound = (value) => value === undefined || Number.isFinite(value);
const texts = (value) => value === undefined || (Array.isArray(value) && value.every(text));
const plain = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const each = (check) => (value) => plain(value) && Object.values(value).every((one) => plain(one) && check(one));
const maybe = (check) => (value) => value === null || (plain(value) && check(value));

const SHAPES = {
  rules: each((rule) => bound(rule.min) && bound(rule.max) && [undefined, "drop", "only"].includes(rule.missing)),
  labels: each((rule) => texts(rule.any) && texts(rule.none) && [undefined, "only"].includes(rule.missing)),
  has: each((rule) => text(rule.text) && flag(rule.regex)),
  views: each((rule) => typeof rule.keep === "boolean" && (rule.reason === undefined || text(rule.reason))),
  compare: maybe((two) => text(two.one) && text(two.other) && SIDES.includes(two.side)),
  sort: maybe((order) => text(order.field) && flag(order.descending)),
  alike: maybe((to) => text(to.key) && text(to.column)),
  text: maybe((search) => text(search.words) && (search.column === undefined || text(search.column))),
  clip: (value) => value === null || text(value),
  at: (value) => Number.isInteger(value) && value >= 0,
};

export function write(state) {
  const parameters = new URLSearchParams();
  for (const [name, empty] of Object.entries(nothing())) {
    const value = JSON.stringify(state[name]);
    if (value !== JSON.stringify(empty)) parameters.set(name, value);
  }
  return parameters.toString();
}

// Throws where the fragment is none that `write` makes.
export function read(fragment) {
  const state = nothing();
  for (const [name, value] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    if (!Object.hasOwn(SHAPES, name)) throw new Error(`The link asks for “${name}”, which this page does not know.`);
    let parsed;
    try {
      parsed = JSON.parse(value);
    } catch {
      parsed = undefined;
    }
    if (parsed === undefined || !SHAPES[name](parsed)) throw new Error(`The link's “${name}” cannot be read.`);
    state[name] = parsed;
  }
  return state;
}

// The body of a query.
export function question(state) {
  const where = [];
  for (const [field, rule] of Object.entries(state.rules)) where.push({ field, ...rule });
  for (const [field, rule] of Object.entries(state.labels)) where.push({ field, ...rule });
  for (const [field, rule] of Object.entries(state.has)) where.push({ field, has: rule.text, regex: rule.regex });
  for (const [view, rule] of Object.entries(state.views)) where.push({ view, keep: rule.keep, reason: rule.reason });
  if (state.compare) where.push({ compare: [state.compare.one, state.compare.other], side: state.compare.side });
  return {
    where,
    ...(state.sort && { sort: state.sort }),
    ...(state.alike && { alike: state.alike }),
    ...(state.text && { text: state.text }),
  };
}

// A copy with one entry of a part set, or taken away where the value is null.
export function put(state, part, name, value) {
  const entries = { ...state[part] };
  if (value == null) delete entries[name];
  else entries[name] = value;
  return { ...state, [part]: entries };
}

export function bounds({ min, max, missing }) {
  if (missing === "only") return "is missing";
  const there = missing ? ", and there" : "";
  if (min === undefined && max === undefined) return "is there";
  if (min === undefined) return `≤ ${number(max)}${there}`;
  if (max === undefined) return `≥ ${number(min)}${there}`;
  return `${number(min)} to ${number(max)}${there}`;
}

export function side({ one, other, side: name }) {
  return { one: `only in ${one}`, other: `only in ${other}`, both: `in ${one} and ${other}`,
    neither: `neither in ${one} nor in ${other}` }[name];
}

// What is asked, in words, each with the state that does not ask it.
export function asked(state) {
  const list = [];
  const entry = (part, name, words) => list.push({ part, name, words, without: put(state, part, name, null) });
  const single = (part, words) => list.push({ part, words, without: { ...state, [part]: null } });

  if (state.alike) single("alike", `alike ${state.alike.key} by ${state.alike.column}`);
  if (state.text) single("text", `looks like “${state.text.words}”`);
  for (const [field, rule] of Object.entries(state.has)) {
    entry("has", field, rule.regex ? `${field} matches /${rule.text}/` : `${field} has “${rule.text}”`);
  }
  for (const [field, rule] of Object.entries(state.rules)) entry("rules", field, `${field} ${bounds(rule)}`);
  for (const [field, { any = [], none = [], missing }] of Object.entries(state.labels)) {
    const words = [missing && "none", any.length && any.join(" or "), none.length && `not ${none.join(", ")}`].filter(Boolean);
    entry("labels", field, `${field}: ${words.join("; ")}`);
  }
  for (const [view, { keep, reason }] of Object.entries(state.views)) {
    entry("views", view, keep ? `in ${view}` : `out of ${view}${reason === undefined ? "" : `: ${reason}`}`);
  }
  if (state.compare) single("compare", side(state.compare));
  return list;
}
