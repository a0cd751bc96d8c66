// The search: words or an expression in the texts of a dataset, or words that clips look like.

import { find, make } from "./dom.js";
import { put } from "./state.js";

const TYPING = 220;  // milliseconds after the last key

// `state`: at the beginning. `change(update, live, name)` applies a function to it.
export function makeSearch(dataset, state, change) {
  const field = find("#search-in"), words = find("#search-words"), regex = find("#search-regex");
  const pressed = () => regex.getAttribute("aria-pressed") === "true";

  const fields = dataset.fields.filter((one) => one.kind === "text").map((one) => one.name);
  const options = fields.sort((one, other) => (other === "caption") - (one === "caption")).map((name) => [name, name]);
  if (dataset.text) options.push(["text", "looks like"]);
  field.replaceChildren(...options.map(([value, words]) => make("option", { value }, words)));
  const set = state.text ? "text" : Object.keys(state.has)[0];
  if (set && options.some(([value]) => value === set)) field.value = set;

  function show(next) {
    state = next;
    const where = field.value;
    regex.hidden = where === "text";
    // what is being typed stays
    if (document.activeElement === words) return;
    words.value = (where === "text" ? state.text?.words : state.has[where]?.text) ?? "";
    regex.setAttribute("aria-pressed", String(Boolean(state.has[where]?.regex)));
  }

  function search(live) {
    const where = field.value, typed = words.value.trim();
    if (where === "text") {
      if (live) return;  // a network reads the words: once, when they are all there
      change((before) => ({ ...before, text: typed ? { words: typed } : null, alike: null, sort: typed ? null : before.sort }));
    } else {
      const rule = typed ? { text: typed, ...(pressed() && { regex: true }) } : null;
      change((before) => put(before, "has", where, rule), live, "search");
    }
  }

  let typing;
  field.addEventListener("change", () => show(state));
  words.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => search(true), TYPING);
  });
  find("#search").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typing);
    search(false);
  });
  regex.addEventListener("click", () => {
    regex.setAttribute("aria-pressed", String(!pressed()));
    search(false);
  });

  return { show };
}
