// Start the page: sign in, follow the hub, show the section that the address names.

import { $, say } from "./dom.js";
import * as hub from "./hub.js";
import { showRun } from "./run.js";
import { showEdges, changeEdges, showRunOfEdges, resizeEdges } from "./edges.js";
import { showRules } from "./do.js";

const SECTIONS = ["run", "edges", "do"];
const AGAIN_SECONDS = 5;
let run = null;

function strip(text) {
  $("link-state").hidden = !text;
  say($("link-state"), text);
}

function gate(reason) {
  $("pages").hidden = true;
  $("sections").hidden = true;
  $("gate").hidden = false;
  $("gate-why").hidden = !reason;
  say($("gate-why"), reason);
  strip("");
}

function route() {
  const asked = location.hash.slice(1);
  const name = SECTIONS.includes(asked) ? asked : "run";
  for (const one of SECTIONS) $(`page-${one}`).hidden = one !== name;
  for (const link of $("sections").querySelectorAll("a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (asked === name) $(`${name}-title`).focus({ preventScroll: true });
  window.scrollTo(0, 0);
  if (name === "edges") resizeEdges();
  if (run) showRun(run);
}

function title() {
  const done = run.phase === "ended" ? "over" : run.phase === "preparing" ? "preparing" : `${run.rounds_closed}/${run.rules.count}`;
  document.title = `${done} · ${run.run} · FedSODA`;
}

async function start() {
  const isByLink = location.hash.startsWith("#sign-in=");
  let session;
  try {
    session = await hub.signIn();
  } catch (error) {
    if (error instanceof hub.Refused) return gate(isByLink ? sentence(error.message) : "");
    strip("The hub does not answer; trying again.");
    setTimeout(start, AGAIN_SECONDS * 1000);
    return undefined;
  }
  say($("run-name"), session.run);
  $("gate").hidden = true;
  hub.follow({
    run(found) {
      strip("");
      run = found;
      run.ahead = found.now - Date.now() / 1000;
      $("pages").hidden = false;
      $("sections").hidden = false;
      title();
      showRun(run);
      showRunOfEdges(run);
      showRules(run);
    },
    edges: showEdges,
    changed: changeEdges,
    lost: () => strip("The connection to the hub is lost; trying again. What you see is how it was."),
    async ended(why) {
      if (why) return strip(sentence(why));
      strip("The hub has ended, or the session has. Trying again.");
      setTimeout(start, AGAIN_SECONDS * 1000);
      return undefined;
    },
  });
  return undefined;
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}.`.replaceAll("`", "");
}

const THEMES = { "": "as the system", light: "light", dark: "dark" };

function themes() {
  const root = document.documentElement;
  const button = $("theme");
  const show = () => {
    const now = root.dataset.theme ?? "";
    button.setAttribute("aria-label", `Colours: ${THEMES[now]}`);
    say(button, { "": "Auto", light: "Light", dark: "Dark" }[now]);
  };
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(root.dataset.theme ?? "") + 1) % names.length];
    if (next) root.dataset.theme = next;
    else delete root.dataset.theme;
    try {
      localStorage.setItem("fedsoda-theme", next);
    } catch {
      // no storage: it counts until the page is loaded again
    }
    show();
    if (run) showRun(run, true);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => run && showRun(run, true));
  show();
}

themes();
window.addEventListener("hashchange", () => {
  if (location.hash.startsWith("#sign-in=")) location.reload();
  else route();
});
route();
start();
