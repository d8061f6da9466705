// Show the edges: a row each, of which only those in sight are in the document.

import { $, bytes, el, figure, moment, number, say } from "./dom.js";
import { ask } from "./hub.js";
import { invite, sure, tell } from "./do.js";

const NAMES = ["edge", "state", "kind", "fingerprint", "device", "size_class", "step", "steps", "done", "invited", "up", "down", "norm", "cosine", "kept", "last_seen", "is_connected"];
const LOOKS = {
  training: "work", starting: "work", ready: "good", "update in": "good", "getting ready": "work", paused: "warn", declined: "warn",
  refused: "bad", left: "off", away: "off", "not joined yet": "off", "link expired": "off", revoked: "bad",
};
const RANK = ["training", "starting", "update in", "ready", "getting ready", "paused", "declined", "refused", "left", "away", "not joined yet", "link expired", "revoked"];
const COLUMNS = [
  { key: "edge", name: "Edge", by: (row) => row.edge },
  { key: "state", name: "State", by: (row) => RANK.indexOf(row.state) },
  { key: "device", name: "Device", by: (row) => row.device },
  { key: "step", name: "Step", by: (row) => -(row.step ?? -1) / (row.steps || 1) },
  { key: "rounds", name: "Rounds", isNumber: true, by: (row) => -row.done },
  { key: "bytes", name: "Up / down", isNumber: true, by: (row) => -(row.up + row.down) },
  { key: "fit", name: "Norm / cosine", isNumber: true, by: (row) => row.cosine ?? 2 },
  { key: "seen", name: "Last seen", isNumber: true, by: (row) => (row.is_connected ? -Infinity : -(row.last_seen ?? 0)) },
];
const SPARE = 6; // rows above and below those in sight
const rows = new Map();
const nodes = new Map();
let order = [];
let sorted = COLUMNS[0];
let isDown = false;
let run = null;
const natural = new Intl.Collator("en", { numeric: true });
const space = $("edge-rows");

const read = (values) => Object.fromEntries(NAMES.map((name, at) => [name, values[at]]));

/** Show these edges and no others. */
export function showEdges(found) {
  rows.clear();
  changeEdges(found);
}

/** Show these rows as they are now. */
export function changeEdges(found) {
  for (const values of found) {
    const row = read(values);
    rows.set(row.edge, row);
  }
  arrange();
}

export function showRunOfEdges(found) {
  run = found;
}

/** Fit the table to the window, as when its section is shown. */
export function resizeEdges() {
  arrange();
}

function arrange() {
  const wanted = $("filter").value.trim().toLowerCase();
  const all = [...rows.values()];
  const matching = wanted ? all.filter((row) => `${row.edge} ${row.state} ${row.device} ${row.fingerprint ?? ""}`.toLowerCase().includes(wanted)) : all;
  const sign = isDown ? -1 : 1;
  matching.sort((a, b) => {
    const [x, y] = [sorted.by(a), sorted.by(b)];
    const way = typeof x === "string" ? natural.compare(x, y) : x < y ? -1 : x > y ? 1 : 0;
    return sign * way || natural.compare(a.edge, b.edge);
  });
  order = matching;
  const here = all.filter((row) => row.is_connected).length;
  say($("edges-count"), all.length ? `${number(here)} of ${number(all.length)} connected${wanted ? `, ${number(matching.length)} match` : ""}` : "");
  $("edge-table").hidden = !matching.length;
  $("edges-empty").hidden = Boolean(matching.length);
  say($("edges-empty"), all.length ? "No edge matches." : "No edges yet. Invite one: you get a link to send, and the edge appears here once its device has used it.");
  $("edge-table").setAttribute("aria-rowcount", String(matching.length + 1));
  draw();
}

function height() {
  const root = document.documentElement;
  return parseFloat(getComputedStyle(root).getPropertyValue("--row")) * parseFloat(getComputedStyle(root).fontSize);
}

function draw() {
  if ($("page-edges").hidden) return;
  const tall = height();
  const view = $("viewport");
  space.style.height = `${order.length * tall}px`;
  const first = Math.max(0, Math.floor(view.scrollTop / tall) - SPARE);
  const last = Math.min(order.length, Math.ceil((view.scrollTop + view.clientHeight) / tall) + SPARE);
  const inSight = new Set();
  for (let at = first; at < last; at += 1) {
    const row = order[at];
    inSight.add(row.edge);
    let node = nodes.get(row.edge);
    if (!node) {
      node = make(row.edge);
      nodes.set(row.edge, node);
      space.append(node.row);
    }
    node.row.style.top = `${at * tall}px`;
    node.row.setAttribute("aria-rowindex", String(at + 2));
    fill(node, row);
  }
  for (const [edge, node] of nodes) {
    if (!inSight.has(edge)) {
      node.row.remove();
      nodes.delete(edge);
    }
  }
}

function make(edge) {
  const cells = {};
  const row = el("div", { role: "row", class: "row" });
  for (const { key, isNumber } of COLUMNS) {
    cells[key] = el("div", { role: key === "edge" ? "rowheader" : "cell", class: `cell c-${key} ${key === "edge" ? "edge" : ""} ${isNumber ? "num" : ""}` });
    row.append(cells[key]);
  }
  const more = el("button", { type: "button", class: "more", "aria-haspopup": "menu", "aria-label": `Actions for ${edge}`, on: { click: () => menu(more, edge) } }, "⋯");
  row.append(el("div", { role: "cell", class: "cell c-more" }, more));
  const name = el("span");
  const mark = el("small");
  cells.edge.append(name, mark);
  cells.edge.title = edge;
  const stepped = el("span");
  const bar = el("span", { class: "step", "aria-hidden": "true" }, el("span"));
  cells.step.append(stepped, bar);
  return { row, cells, name, mark, stepped, bar };
}

function fill({ cells, name, mark, stepped, bar }, row) {
  say(name, row.edge);
  say(mark, row.fingerprint ?? (row.kind === "token" ? "token" : ""));
  say(cells.state, row.state);
  cells.state.className = `cell c-state state ${LOOKS[row.state] ?? ""}`;
  say(cells.device, row.device || "–");
  cells.device.title = row.device;
  say(stepped, row.step === null ? "–" : `${number(row.step)} of ${number(row.steps)}`);
  bar.hidden = row.step === null;
  bar.firstElementChild.style.width = row.steps ? `${(100 * row.step) / row.steps}%` : "0";
  say(cells.rounds, row.invited ? `${number(row.done)} of ${number(row.invited)}` : "–");
  say(cells.bytes, row.up + row.down ? `${bytes(row.up)} / ${bytes(row.down)}` : "–");
  say(cells.fit, row.norm === null ? "–" : `${row.norm.toPrecision(3)} / ${row.cosine === null ? "–" : figure(row.cosine, 2)}`);
  say(cells.seen, row.is_connected ? "now" : row.last_seen === null ? "never" : ago(row.last_seen));
  cells.seen.title = row.last_seen === null ? "" : moment(row.last_seen);
}

function ago(at) {
  const passed = Math.max(0, Date.now() / 1000 + (run?.ahead ?? 0) - at);
  if (passed < 90) return "a minute ago";
  if (passed < 5400) return `${Math.round(passed / 60)} min ago`;
  if (passed < 129600) return `${Math.round(passed / 3600)} h ago`;
  return `${Math.round(passed / 86400)} days ago`;
}

// --- what can be done with one -------------------------------------------------------------------------------------

const list = el("div", { class: "menu", role: "menu", popover: "auto", "aria-label": "Actions" });
document.body.append(list);

function menu(button, edge) {
  const row = rows.get(edge);
  const entry = (text, look, act) => el("button", { type: "button", role: "menuitem", class: look, on: { click: () => { list.hidePopover(); act(); } } }, text);
  const entries = row.state === "revoked"
    ? [entry("Invite again", "", () => invite(edge))]
    : row.state === "not joined yet" || row.state === "link expired"
      ? [entry("Make a new link", "", () => invite(edge)), entry("Revoke", "danger", () => revoke(edge))]
      : [entry("Rebind to another device", "", () => rebind(row)), entry("Revoke", "danger", () => revoke(edge))];
  list.replaceChildren(...entries);
  list.showPopover();
  const place = button.getBoundingClientRect();
  list.style.top = `${Math.min(place.bottom + 4, innerHeight - list.offsetHeight - 8)}px`;
  list.style.left = `${Math.max(8, place.right - list.offsetWidth)}px`;
  entries[0].focus();
}

list.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const all = [...list.children];
  all[(all.indexOf(document.activeElement) + step + all.length) % all.length].focus();
});

async function revoke(edge) {
  if (await sure(`Revoke ${edge}?`, "Its connection ends within seconds, and its link or token is worth nothing any more. What it gave stays in the model.", "Revoke")) {
    await tell(() => ask("revoke", { edge }), true);
  }
}

async function rebind(row) {
  if (row.kind === "token") {
    if (await sure(`Rebind ${row.edge}?`, "The next device that joins with its token is its device.", "Rebind")) await tell(() => ask("rebind", { edge: row.edge }), true);
  } else if (await sure(`Rebind ${row.edge}?`, "Its device is shut out, and you get a new link for another one, or for the same one after it lost its files.", "Rebind")) {
    await invite(row.edge, true);
  }
}

// --- heads and filter ----------------------------------------------------------------------------------------------

function heads() {
  $("edge-heads").replaceChildren(
    ...COLUMNS.map((column) => el("div", { role: "columnheader", class: `cell c-${column.key} ${column.isNumber ? "num" : ""}`, "aria-sort": column === sorted ? (isDown ? "descending" : "ascending") : "none" },
      el("button", { type: "button", on: { click: () => sortBy(column) } }, column.name + (column === sorted ? (isDown ? " ↓" : " ↑") : "")))),
    el("div", { role: "columnheader", class: "cell c-more" }, el("span", { class: "sr" }, "Actions")),
  );
}

function sortBy(column) {
  isDown = column === sorted ? !isDown : false;
  sorted = column;
  heads();
  $("edge-heads").children[COLUMNS.indexOf(column)].firstElementChild.focus();
  arrange();
}

$("viewport").addEventListener("scroll", draw, { passive: true });
window.addEventListener("resize", draw);
$("filter").addEventListener("input", () => {
  $("viewport").scrollTop = 0;
  arrange();
});
$("invite").addEventListener("click", () => invite());
heads();
setInterval(draw, 30_000);
