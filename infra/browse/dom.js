// Elements and words. What the server says becomes text nodes and attributes, never markup: a caption that is a script
// stays words.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const find = (selector) => document.querySelector(selector);

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

export const count = (number) => number.toLocaleString("en");

export function number(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return Math.abs(value) < 1e4 ? String(value) : count(value);
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2);
  return String(Number(value.toPrecision(size >= 100 ? 4 : 3)));
}

export const shown = (value) => (typeof value === "number" ? number(value) : value == null ? "–" : String(value));

// the step of a handle: 1, 2 or 5 times a power of ten, some 200 of them from end to end
export function step(low, high) {
  const least = (high - low) / 200;
  if (!(least > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((times) => times * power >= least * 0.999);
}

export function rounded(value, by) {
  const digits = clamp(-Math.floor(Math.log10(by)), 0, 12);
  return Number((Math.round(value / by) * by).toFixed(digits));
}

export const clipUrl = (key) => `/clip/${encodeURIComponent(key)}.mp4`;
export const stillUrl = (key, width) => `/still/${encodeURIComponent(key)}.jpg?w=${width}`;

export async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select it and copy";
  }
  setTimeout(() => (button.textContent = label), 1500);
}
