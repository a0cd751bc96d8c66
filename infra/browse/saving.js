// The dialog that makes a view of the rules, and the recipe lines that make the same one.

import { copy, count, find, make } from "./dom.js";
import { asked } from "./state.js";

// Whether a part of what is asked is a rule of a recipe, too. `curate` chooses by no split, and keeps no clips for lacking a value.
const ruled = (part, field, rule) => ["rules", "labels"].includes(part) && field !== "split" && rule.missing !== "only";

// What the server is asked to make.
export function view(name, state, exact_duplicates) {
  const [rules, labels] = ["rules", "labels"].map((part) => Object.entries(state[part]).filter(([field, rule]) => ruled(part, field, rule)));
  return { name, rules: Object.fromEntries(rules),
    labels: Object.fromEntries(labels.map(([field, { any, none }]) => [field, { only: any, never: none }])), exact_duplicates };
}

// `api` has recipe and save; `saved()` is called after a view was written.
export function makeSaving(dataset, api, { state, saved }) {
  const dialog = find("#save"), name = find("#save-name"), lines = find("#save-recipe"), says = find("#save-says");
  const write = find("#save-write"), left = find("#save-left"), rules = find("#save-rules");
  const duplicates = find("#save-duplicates"), copying = find("#save-copy");
  let round = 0;

  const wanted = () => view(name.value.trim(), state(), duplicates.checked);

  function say(line, wrong = false) {
    says.textContent = line;
    says.classList.toggle("wrong", wrong);
  }

  async function preview() {
    const mine = ++round;
    // the first answer takes seconds: the server loads what curates
    if (!lines.textContent) lines.textContent = "…";
    copying.disabled = lines.textContent === "…";
    try {
      const answer = await api.recipe(wanted());
      if (mine === round) {
        lines.textContent = answer.recipe;
        copying.disabled = false;
      }
    } catch (error) {
      if (mine === round) {
        lines.textContent = "";
        say(error.message, true);
      }
    }
  }

  copying.addEventListener("click", (event) => copy(lines.textContent, event.target));
  find("#save-close").addEventListener("click", () => dialog.close());
  for (const input of [name, duplicates]) {
    input.addEventListener("input", () => {
      say("");
      if (name.validity.valid) preview();
    });
  }
  find("#save form").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!dataset.writable) return;
    write.disabled = true;
    say("Writing …");
    try {
      const answer = await api.save(wanted());
      lines.textContent = answer.recipe;
      const dropped = answer.dropped.map((one) => `${one.value} (${count(one.count)})`);
      say([`Kept ${count(answer.kept)} of ${count(dataset.clips)} clips: ${answer.uri}`, ...dropped].join("; "));
      await saved(answer);
    } catch (error) {
      say(error.message, true);
    } finally {
      write.disabled = false;
    }
  });

  return {
    open() {
      const all = asked(state());
      const items = (list) => list.map(({ words }) => make("li", {}, words));
      const inside = all.filter(({ part, name }) => ruled(part, name, state()[part]?.[name]));
      const outside = all.filter((one) => !inside.includes(one));
      rules.replaceChildren(...(inside.length ? items(inside) : [make("li", {}, "no rule: every clip is kept")]));
      left.hidden = !outside.length;
      left.querySelector("ul").replaceChildren(...items(outside));
      write.hidden = !dataset.writable;
      say(dataset.writable ? "" : "Read-only: start `longtake browse` with --write to save from here, or copy the lines below into a recipe.");
      dialog.showModal();
      name.focus();
      preview();
    },
  };
}
