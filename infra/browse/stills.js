// Middle frames, a few at a time: a browser opens six connections to a server, and a question must not wait behind pictures.

const AT_ONCE = 3;

const waiting = new Map();  // image: its address
const loading = new Set();
let held = false;

function next() {
  for (const [image, address] of waiting) {
    if (held || loading.size >= AT_ONCE) return;
    waiting.delete(image);
    loading.add(image);
    image.addEventListener("load", ended, { once: true });
    image.addEventListener("error", ended, { once: true });
    image.src = address;
  }
}

function ended(event) {
  if (loading.delete(event.target)) next();
}

export function load(image, address) {
  if (image.getAttribute("src") === address) return;
  waiting.set(image, address);
  next();
}

export function leave(image) {
  waiting.delete(image);
  image.removeAttribute("src");
  if (loading.delete(image)) next();
}

// While a question is open no further picture is asked for.
export function hold(on) {
  held = on;
  next();
}
