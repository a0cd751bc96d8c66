// A clip in the grid: its middle frame, which plays under the pointer, at a touch and with the focus.

import { clipUrl, make, shown, stillUrl } from "./dom.js";
import { leave, load } from "./stills.js";

const HOVER = 90;  // milliseconds before a clip plays, so that passing over many loads none

// open(index)    alike(row)    lead() -> the field that is shown first    out(row) -> why it is out of a view, or null
export function makeCards({ open, alike, lead, out }) {
  let playing = null;

  return (index) => {
    let row = null, video = null, wait;
    const image = make("img", { alt: "", draggable: "false", decoding: "async" });
    const mark = make("span", { class: "mark", hidden: true });
    const frame = make("div", { class: "picture" }, image, mark);
    const caption = make("p", { class: "caption" });
    const facts = make("p", { class: "facts" });
    const near = make("button", {
      type: "button", class: "near", tabindex: -1, title: "Clips alike (a)", "aria-label": "Clips alike this one", hidden: true,
      onclick: (event) => {
        event.stopPropagation();
        alike(row);
      },
    }, "≈");
    const element = make("div", { class: "card waiting", role: "gridcell", "data-index": index }, frame, near, facts, caption);

    function play() {
      if (!row || video) return;
      if (playing && playing !== stop) playing(false);
      playing = stop;
      video = make("video", { muted: true, loop: true, playsinline: true, "aria-hidden": "true", tabindex: -1 });
      video.muted = true;
      video.addEventListener("playing", () => element.classList.add("playing"));
      video.addEventListener("error", () => {
        if (!video) return;
        frame.append(make("span", { class: "broken" }, "This clip cannot be played."));
        stop(false);
      });
      video.src = clipUrl(row.key);
      frame.append(video);
      video.play().catch(() => {});
    }

    function stop(gone) {
      clearTimeout(wait);
      if (playing === stop) playing = null;
      if (video) {
        video.pause();
        video.removeAttribute("src");
        video.load();
        video.remove();
        video = null;
        element.classList.remove("playing");
      }
      if (gone) leave(image);
    }

    const soon = () => {
      clearTimeout(wait);
      wait = setTimeout(play, HOVER);
    };
    element.addEventListener("pointerenter", (event) => event.pointerType !== "touch" && soon());
    element.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && stop(false));
    element.addEventListener("focus", () => element.matches(":focus-visible") && soon());
    element.addEventListener("blur", () => stop(false));
    element.addEventListener("keydown", (event) => {
      if (event.key === " ") {
        event.preventDefault();
        if (video) stop(false);
        else play();
      } else if (event.key === "a" && !event.ctrlKey && !event.metaKey && row) alike(row);
    });
    element.addEventListener("click", (event) => {
      // a finger on the picture plays, on the words it opens
      if (event.pointerType === "touch" && frame.contains(event.target)) {
        if (video) stop(false);
        else play();
      } else open(index);
    });

    function fill(clip) {
      if (!clip) return;
      row = clip;
      element.classList.remove("waiting");
      load(image, stillUrl(row.key, 320));
      caption.textContent = row.caption ?? row.key;
      caption.classList.toggle("none", row.caption == null);
      const field = lead();
      const value = field ? row.values?.[field] ?? row[field] : row.likeness;
      const first = value !== undefined && [`${field ?? "alike"} `, make("b", {}, shown(value))];
      const rest = [`${shown(row.seconds)} s`, row.label, `${row.width}×${row.height}`].filter(Boolean).join(" · ");
      facts.replaceChildren(...(first ? [make("span", { class: "lead" }, ...first)] : []), make("span", {}, rest));
      const why = out(row);
      mark.hidden = why == null;
      mark.textContent = mark.title = why ?? "";
      near.hidden = !alike.possible();
    }

    return { index, element, fill, play, stop };
  };
}
