// The server's answers. What is wrong becomes an Error of one line.

export class Refused extends Error {
  constructor(line, status) {
    super(line);
    this.status = status;
  }
}

async function answer(url, options = {}) {
  let response;
  try {
    response = await fetch(url, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is `longtake browse` still running?", 0);
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(body.error ?? `The server answered ${response.status} to ${url}.`, response.status);
  return body;
}

const get = (path, parameters = {}, options = {}) => answer(`${path}?${new URLSearchParams(parameters)}`, options);

const post = (path, body) =>
  answer(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export const dataset = () => get("/api/dataset");
export const query = (question) => post("/api/query", question);
export const rows = (id, from, count) => get("/api/rows", { query: id, from, count });
export const histogram = (id, field, bins = 40) => get("/api/histogram", { query: id, field, bins });
export const clip = (key) => get("/api/clip", { key });
export const recipe = (view) => post("/api/recipe", view);
export const save = (view) => post("/api/view", view);
