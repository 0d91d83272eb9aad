// Requests, and answers that come as server-sent events. What goes wrong is an Error in one line.

/** Return the text of an error that the server told. */
async function told(response) {
  const text = await response.text();
  try {
    const value = JSON.parse(text);
    return value.error?.message ?? value.message ?? text;
  } catch {
    return text || `the server answered ${response.status}`;
  }
}

/** Return the answer to a request; Error. */
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: is `skc serve` still running?");
  }
  if (response.ok) return response;
  const words = await told(response);
  throw new Error(response.status === 429 ? `busy: ${words}` : words);
}

const json = (value) => ({ method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value) });

/** Return the JSON answer to a JSON value, or to a GET without one. */
export async function askJson(path, value, signal) {
  return (await ask(path, value === undefined ? { signal } : { ...json(value), signal })).json();
}

/** Yield [name, value] of every server-sent event of an answer; an event `error` is an Error. */
export async function* askEvents(path, body, signal) {
  const response = await ask(path, { ...(typeof body === "string" ? { method: "POST", body } : json(body)), signal });
  if (!(response.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
    yield ["done", await response.json()];
    return;
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const name = lines.find((line) => line.startsWith("event: "))?.slice(7) ?? "message";
      const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data) continue;
      const told = JSON.parse(data);
      if (name === "error") throw new Error(told.message ?? told.error?.message ?? "the server had an error");
      yield [name, told];
    }
  }
}
