// One clip: it plays, and all that is known of it.

import { clipUrl, copy, make, number, shown } from "./dom.js";

// hooks: step(by), close(), alike(key, column), only(field, label)
export function makeDetails(root, dataset, hooks) {
  const body = make("div", { class: "body" });
  const title = make("h2", { id: "details-title" }, "Clip");
  const close = make("button", { type: "button", class: "quiet", "aria-label": "Close the details", title: "Close (Escape)", onclick: hooks.close }, "✕");
  const previous = make("button", { type: "button", class: "quiet", "aria-label": "Previous clip", title: "Previous clip (←)", onclick: () => hooks.step(-1) }, "←");
  const next = make("button", { type: "button", class: "quiet", "aria-label": "Next clip", title: "Next clip (→)", onclick: () => hooks.step(1) }, "→");
  root.replaceChildren(make("header", {}, title, previous, next, close), body);
  root.addEventListener("keydown", (event) => {
    if (event.target.closest("video, input, select") || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") hooks.step(-1);
    else if (event.key === "ArrowRight") hooks.step(1);
    else if (event.key === "a") root.querySelector(".alike")?.click();
    else return;
    event.preventDefault();
  });
  const fields = new Map(dataset.fields.map((field) => [field.name, field]));

  function value(name, value) {
    const field = fields.get(name);
    const line = make("tr", {}, make("th", { scope: "row", title: field?.meaning ?? null }, name));
    if (typeof value === "number" && field?.kind === "number") {
      const span = field.high - field.low;
      const where = span > 0 ? Math.min(1, Math.max(0, (value - field.low) / span)) : 0;
      const dot = make("i", {});
      dot.style.left = `${100 * where}%`;
      line.append(make("td", { class: "n" }, number(value)),
        make("td", { class: "place", title: `${number(field.low)} to ${number(field.high)} in this dataset` }, dot));
    } else if (value != null && field?.kind === "label") {
      line.append(make("td", { colspan: 2 }, make("button", { type: "button", class: "link", title: `Only clips with ${value}`,
        onclick: () => hooks.only(name, value) }, shown(value))));
    } else line.append(make("td", { colspan: 2 }, shown(value)));
    return line;
  }

  function views(reasons) {
    return Object.entries(reasons ?? {}).map(([view, reason]) =>
      make("tr", { class: reason == null ? "kept" : "out" }, make("th", { scope: "row" }, view),
        make("td", {}, reason == null ? "kept" : `out: ${reason}`)),
    );
  }

  // Each column has captions, or a word why it has none for this clip.
  function captions(clip) {
    return Object.entries(clip.captions ?? {}).flatMap(([column, list]) => {
      if (typeof list === "string") return [make("p", { class: "none" }, `${column}: no caption (${list})`)];
      return list.map(({ text, start, end, language, source }) => {
        const part = (start != null || end != null) && `${number(start ?? 0)} to ${number(end ?? clip.seconds)} s`;
        return make("blockquote", {}, make("p", {}, text),
          make("small", {}, [part, language, source && `by ${source}`].filter(Boolean).join(" · ")));
      });
    });
  }

  const table = (title, rows) => (rows.length ? [make("h3", {}, title), make("table", {}, make("tbody", {}, ...rows))] : []);

  return {
    show(clip) {
      title.textContent = clip.key;
      const video = make("video", { controls: true, autoplay: true, loop: true, playsinline: true, "aria-label": `Clip ${clip.key}` });
      video.muted = true;
      const broken = make("p", { class: "wrong", hidden: true }, "This clip cannot be played.");
      video.addEventListener("error", () => (broken.hidden = false));
      video.src = clipUrl(clip.key);
      const key = make("button", { type: "button", onclick: () => copy(clip.key, key) }, "Copy key");
      const near = dataset.alike.map((column) =>
        make("button", { type: "button", class: "alike", onclick: () => hooks.alike(clip.key, column) },
          dataset.alike.length > 1 ? `Clips alike by ${column}` : "Clips alike"));
      const facts = [`${shown(clip.seconds)} s`, clip.fps && `${number(clip.fps)} fps`, `${clip.width}×${clip.height}`, clip.split,
        clip.start_seconds != null && `from ${number(clip.start_seconds)} s on`];
      // what the line of facts says already is left out of the table
      const known = new Set(["seconds", "fps", "width", "height", "split", "source"]);
      const values = Object.entries(clip.values ?? {}).filter(([name]) => !known.has(name));
      const given = values.filter(([name]) => name.includes(".")), common = values.filter(([name]) => !name.includes("."));
      body.replaceChildren(
        make("div", { class: "film" }, video), broken,
        make("p", { class: "facts" }, facts.filter(Boolean).join(" · ")),
        make("p", { class: "source" }, clip.source ?? ""),
        ...captions(clip),
        make("div", { class: "actions" }, ...near, key),
        ...table("Views", views(clip.reasons)),
        ...table("Scores", given.map(([name, one]) => value(name, one))),
        ...table("Clip", common.map(([name, one]) => value(name, one))),
      );
      body.scrollTop = 0;
    },
    clear: () => body.replaceChildren(),
    focus: () => close.focus({ preventScroll: true }),
  };
}
