// Talk to the hub: who is signed in, what happens, and what its owner asks.

let csrf = "";

export class Refused extends Error {
  constructor(status, reason) {
    super(reason);
    this.status = status;
  }
}

async function answered(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // no JSON: a proxy answered
  }
  if (!response.ok) throw new Refused(response.status, body?.reason ?? `the hub answered with status ${response.status}`);
  return body;
}

async function post(path, body = {}) {
  return answered(
    await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
      body: JSON.stringify(body),
    }),
  );
}

/** Sign in with the link that brought us here, if one did, and return the session. Its secret is no longer in the address. */
export async function signIn() {
  const given = /^#sign-in=([\w-]+)$/.exec(location.hash);
  let session;
  if (given) {
    history.replaceState(null, "", location.pathname + location.search);
    session = await post("page/sign-in", { secret: given[1] });
  } else {
    session = await answered(await fetch("page/session"));
  }
  csrf = session.csrf;
  return session;
}

export async function signOut() {
  await post("page/sign-out");
}

/** Ask for an action; the answer has a sentence in `said`. */
export const ask = (action, body) => post(`page/do/${action}`, body);

export const layers = async () => answered(await fetch("page/layers"));

/** Download a file that the hub makes first. */
export async function download(what) {
  const response = await fetch(`page/download/${what}`);
  if (!response.ok) await answered(response);
  const named = /filename="([^"]+)"/.exec(response.headers.get("content-disposition") ?? "");
  const url = URL.createObjectURL(await response.blob());
  const link = document.createElement("a");
  link.href = url;
  link.download = named ? named[1] : what;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/**
 * Follow what happens until the session ends.
 * listeners: `run`, `edges` (all rows), `changed` (rows), `lost` (no connection: tried again), `ended`.
 */
export function follow(listeners) {
  const source = new EventSource("page/events");
  for (const name of ["run", "edges", "changed"]) {
    source.addEventListener(name, (event) => listeners[name](JSON.parse(event.data)));
  }
  source.addEventListener("over", () => {
    source.close();
    listeners.ended();
  });
  source.addEventListener("full", () => {
    source.close();
    listeners.ended("too many pages of this hub are open; close one, then load this one again");
  });
  source.addEventListener("error", () => {
    // A browser gives up for good where the answer was not a stream, such as a session that has ended.
    if (source.readyState === EventSource.CLOSED) listeners.ended();
    else listeners.lost();
  });
  return source;
}
