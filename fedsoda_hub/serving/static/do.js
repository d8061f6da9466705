// Do what the owner asks, and say how it went.

import { $, counted, moment, say } from "./dom.js";
import * as hub from "./hub.js";

let run = null;
let isEdited = false;

/** Do something that has an answer, and show its sentence. isHere: where the owner is, rather than in its own section. */
export async function tell(act, isHere = false) {
  const place = $("done");
  try {
    const done = await act();
    said(place, done.said, false);
    if (isHere) flash(done.said);
    return done;
  } catch (error) {
    const why = error instanceof hub.Refused ? error.message : "the hub does not answer; try again";
    said(place, sentence(why), true);
    if (isHere) flash(sentence(why));
    return null;
  }
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`.replaceAll("`", "");

function said(place, text, isBad) {
  say(place, text);
  place.classList.toggle("bad", isBad);
}

function flash(text) {
  const strip = $("link-state");
  strip.hidden = false;
  say(strip, text);
  setTimeout(() => {
    if (strip.textContent === text) strip.hidden = true;
  }, 6000);
}

/** Ask whether the owner is sure. */
export function sure(title, text, yes) {
  const dialog = $("ask");
  say($("ask-title"), title);
  say($("ask-text"), text);
  say($("ask-yes"), yes);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

// --- the run and its rules -----------------------------------------------------------------------------------------

/** Show the rules in force, unless the owner is about to change them. */
export function showRules(found) {
  run = found;
  const isOver = run.phase === "ended";
  const isLast = run.round >= run.rules.count;
  $("pause").hidden = run.is_paused;
  $("resume").hidden = !run.is_paused;
  $("pause").disabled = $("resume").disabled = isOver;
  $("finish").disabled = isOver || !run.round || isLast;
  say($("finish"), run.phase === "collecting" ? "End after this round" : "End the run");
  say($("flow-hint"), isOver ? "The run is over." : isLast && run.round ? "The run ends after this round. Another number of rounds takes that back." : run.is_paused ? "Paused: the open round continues to its end, and no other opens." : "After a pause no round opens; the one that is open continues to its end. Edges stay connected.");
  for (const field of $("rules").elements) field.disabled = isOver;
  if (!isEdited) fillRules();
  document.querySelectorAll("[data-download]").forEach((button) => {
    button.disabled = button.dataset.busy === "yes" || (button.dataset.download === "export" && !run.rounds_closed);
  });
}

function fillRules() {
  const form = $("rules").elements;
  form.count.value = run.rules.count;
  form.quorum.value = +(100 * run.rules.quorum).toFixed(4);
  form.deadline.value = words(run.rules.deadline_seconds);
}

const UNITS = { s: 1, min: 60, h: 3600, d: 86400 };

function words(count) {
  for (const [unit, size] of Object.entries(UNITS).reverse()) if (count >= size && count % size === 0) return `${count / size} ${unit}`;
  return `${count} s`;
}

function readSeconds(text) {
  const found = /^\s*([\d.]+)\s*(s|sec|seconds?|m|min|minutes?|h|hours?|d|days?)\s*$/i.exec(text);
  if (!found) return null;
  const unit = found[2].toLowerCase();
  return Number(found[1]) * UNITS[unit.startsWith("m") ? "min" : unit[0]];
}

function changed() {
  const form = $("rules").elements;
  const [count, quorum, deadline] = [Number(form.count.value), Number(form.quorum.value) / 100, readSeconds(form.deadline.value)];
  const problem = (field, text) => {
    field.setAttribute("aria-invalid", "true");
    field.focus();
    say($("rules-problem"), text);
    return null;
  };
  for (const field of [form.count, form.quorum, form.deadline]) field.removeAttribute("aria-invalid");
  say($("rules-problem"), "");
  if (!Number.isInteger(count) || count < 1) return problem(form.count, "Rounds: write a whole number.");
  if (!(quorum > 0 && quorum <= 1)) return problem(form.quorum, "Quorum: write a percentage, more than 0 and at most 100.");
  if (!(deadline >= 1)) return problem(form.deadline, "Deadline: write a number and s, min, h or d.");
  const asked = {};
  if (count !== run.rules.count) asked.count = count;
  if (Math.abs(quorum - run.rules.quorum) > 1e-9) asked.quorum = quorum;
  if (deadline !== run.rules.deadline_seconds) asked.deadline_seconds = deadline;
  if (!Object.keys(asked).length) return problem(form.count, "Nothing differs from what is in force.");
  return asked;
}

$("rules").addEventListener("input", () => {
  isEdited = true;
});
$("rules").addEventListener("submit", async (event) => {
  event.preventDefault();
  const asked = changed();
  if (asked && (await tell(() => hub.ask("change", asked)))) isEdited = false;
});
$("rules-reset").addEventListener("click", () => {
  isEdited = false;
  say($("rules-problem"), "");
  fillRules();
});
$("pause").addEventListener("click", () => tell(() => hub.ask("pause")));
$("resume").addEventListener("click", () => tell(() => hub.ask("resume")));
$("finish").addEventListener("click", async () => {
  const what = run.phase === "collecting" ? `Round ${run.round} continues to its end, then the run ends.` : "The run ends now.";
  if (await sure("End the run?", `${what} ${counted(run.rounds_closed, "round")} of ${run.rules.count} closed so far.`, "End it")) await tell(() => hub.ask("finish"));
});
document.querySelectorAll("[data-download]").forEach((button) =>
  button.addEventListener("click", async () => {
    const text = button.textContent;
    button.disabled = true;
    button.dataset.busy = "yes";
    say(button, "Being made …");
    await tell(async () => {
      await hub.download(button.dataset.download);
      return { said: "Downloaded." };
    });
    button.dataset.busy = "";
    button.disabled = false;
    say(button, text);
  }),
);
$("sign-out").addEventListener("click", async () => {
  await tell(async () => {
    await hub.signOut();
    return { said: "" };
  });
  location.reload();
});

// --- invitations ---------------------------------------------------------------------------------------------------

let isRebind = false;

/** Open the dialog that makes a link: of a new edge, of this one again, or of another device for it. */
export async function invite(edge = "", isOther = false) {
  isRebind = isOther;
  $("invite-form").hidden = false;
  $("invited").hidden = true;
  $("invite-name").value = edge;
  $("invite-name").readOnly = Boolean(edge);
  say($("invite-problem"), "");
  say($("invitation-title"), isOther ? `A new link for ${edge}` : "Invite an edge");
  $("invitation").showModal();
}

$("invite-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target.elements;
  const edge = form.edge.value.trim();
  if (!/^[\p{L}\p{N}._-]{1,64}$/u.test(edge)) {
    say($("invite-problem"), "A name has 1 to 64 letters, digits, - _ .");
    $("invite-name").focus();
    return;
  }
  try {
    const done = await hub.ask(isRebind ? "rebind" : "invite", { edge, seconds: Number(form.seconds.value) });
    showLink(edge, done);
  } catch (error) {
    say($("invite-problem"), sentence(error instanceof hub.Refused ? error.message : "the hub does not answer; try again"));
  }
});

function showLink(edge, done) {
  $("invite-form").hidden = true;
  $("invited").hidden = false;
  say($("invited-title"), `The link for ${edge}`);
  say($("invited-said"), `${done.said} It can be used until ${moment(done.expires)}.`);
  $("invited-link").value = `fedsoda-edge join "${done.link}" --data YOUR-ROWS.jsonl`;
  say($("copied"), "");
  qr($("qr"), done.qr);
  $("invited-title").focus();
}

/** Draw a QR code: one path of all dark cells, with the margin of 4 that readers need. */
function qr(svg, rows) {
  const size = rows.length + 8;
  svg.setAttribute("viewBox", `0 0 ${size} ${size}`);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const cells = rows.flatMap((row, y) => [...row].map((cell, x) => (cell === "1" ? `M${x + 4} ${y + 4}h1v1h-1z` : "")));
  path.setAttribute("d", cells.join(""));
  path.setAttribute("fill", "#000");
  path.setAttribute("shape-rendering", "crispEdges");
  svg.replaceChildren(path);
}

$("copy").addEventListener("click", async () => {
  const text = $("invited-link");
  try {
    await navigator.clipboard.writeText(text.value);
    say($("copied"), "Copied.");
  } catch {
    text.select(); // no clipboard without TLS: the text is selected, for the keyboard
    say($("copied"), "Selected: copy it with Ctrl+C.");
  }
});
document.querySelectorAll("[data-close]").forEach((button) => button.addEventListener("click", () => $("invitation").close()));
$("invitation").addEventListener("close", () => {
  $("invited-link").value = "";
  $("qr").replaceChildren();
});
