// Show the run: its sentence, its figures, its curves as they grow.

import { $, bytes, counted, css, el, figure, moment, number, percent, say, seconds } from "./dom.js";
import * as hub from "./hub.js";

const PHASES = { preparing: "Preparing", idle: "Between rounds", collecting: "Round open", ended: "Over" };
const NAMES = { full: "Full model, untouched", sub_llm: "Sub-LLM", plug_in: "Plug-in" };
const COLOURS = { full: "--third", sub_llm: "--second", plug_in: "--accent" };
let shown = null;

/** Show the run. isNew: whether all has to be drawn again, as with other colours. */
export function showRun(run, isNew = false) {
  shown = run;
  const pill = $("phase");
  const phase = run.phase === "idle" && !run.round ? "Waiting" : PHASES[run.phase];
  say(pill, run.is_paused && run.phase !== "ended" ? "Paused" : phase);
  pill.className = `pill${run.is_paused && run.phase !== "ended" ? " warn" : run.phase === "ended" ? " plain" : ""}`;
  say($("began"), run.began_at === null ? "" : `began ${moment(run.began_at)}`);
  say($("sentence"), capital(run.sentence));
  say($("next"), run.next);
  const share = run.rules.count ? run.rounds_closed / run.rules.count : 0;
  const progress = $("progress");
  progress.setAttribute("aria-valuemax", run.rules.count);
  progress.setAttribute("aria-valuenow", run.rounds_closed);
  progress.firstElementChild.style.width = `${100 * Math.min(1, share)}%`;
  say($("progress-text"), `${number(run.rounds_closed)} of ${counted(run.rules.count, "round")} closed`);
  countDown();
  tiles(run);
  if ($("page-run").hidden) return;
  models(run);
  curves(run, isNew);
  alignment(run);
  plan(run, isNew);
}

const capital = (text) => text && text[0].toUpperCase() + text.slice(1);

function countDown() {
  if (!shown) return;
  const left = shown.due_at === null ? null : shown.due_at - shown.ahead - Date.now() / 1000;
  say($("due"), left === null ? "" : left > 0 ? `deadline in ${seconds(left)}` : "at its deadline");
}
setInterval(countDown, 1000);

function tiles(run) {
  const last = run.closed.loss.at(-1);
  const mean = run.closed.seconds.length ? run.closed.seconds.reduce((a, b) => a + b, 0) / run.closed.seconds.length : null;
  const best = run.models.find((model) => model.name === "plug_in");
  const pairs = run.closed.updates.reduce((a, b) => a + b, 0);
  const rows = [
    ["Edges connected", number(run.edges_connected), `of ${number(run.edges_known)}`],
    ["Last loss", last === undefined ? "–" : figure(last), last === undefined ? "" : "nats"],
    ["Plug-in accuracy", best ? percent(best.accuracy) : "–", best ? `on ${counted(run.judged_rows, "row")}` : "not judged yet"],
    ["A round takes", mean === null ? "–" : seconds(mean), mean === null ? "" : "on average"],
    ["Up / down", `${bytes(run.bytes_up)} / ${bytes(run.bytes_down)}`, pairs ? `${counted(pairs, "update")}` : ""],
  ];
  const there = $("tiles").children;
  if (there.length !== rows.length) {
    $("tiles").replaceChildren(...rows.map(([name]) => el("div", {}, el("dt", {}, name), el("dd", {}, el("span"), " ", el("small")))));
  }
  rows.forEach(([, value, more], at) => {
    say(there[at].querySelector("span"), value);
    say(there[at].querySelector("small"), more);
  });
}

// --- which model is better -----------------------------------------------------------------------------------------

function models(run) {
  if (!run.models.length) {
    const why = run.judged.round.length ? "" : "Nothing is judged yet. With [task] eval_data the hub judges the run at its end, with eval_every in between too.";
    return keep($("models"), "", () => el("p", { class: "empty" }, why));
  }
  const low = Math.max(0, Math.min(...run.models.map((one) => one.low)) - 0.05);
  const high = Math.min(1, Math.max(...run.models.map((one) => one.high)) + 0.05);
  const place = (share) => `${(100 * (share - low)) / (high - low)}%`;
  const key = JSON.stringify(run.models);
  return keep($("models"), key, () => {
    const list = el("ul", { class: "models" });
    for (const one of run.models) {
      const range = el("span", { class: "range" });
      range.style.left = place(one.low);
      range.style.right = `${100 - (100 * (one.high - low)) / (high - low)}%`;
      const dot = el("span", { class: "dot" });
      dot.style.left = place(one.accuracy);
      list.append(
        el("li", { class: one.name }, el("span", {}, NAMES[one.name] ?? one.name),
          el("span", { class: "track", "aria-hidden": "true" }, range, dot),
          el("span", { class: "figure" }, percent(one.accuracy), el("small", {}, `  ${percent(one.low)} to ${percent(one.high)}`))),
      );
    }
    return el("div", {}, list, el("p", { class: "verdict" }, verdict(run)));
  });
}

function verdict(run) {
  const after = run.judged.round.at(-1);
  const full = run.models.find((one) => one.name === "full");
  const plug = run.models.find((one) => one.name === "plug_in");
  const kept = run.best && run.best.round !== after ? ` Report and adapter are of round ${run.best.round}, the best by ${run.best.metric.replace("_", " ")}.` : "";
  const basis = `Accuracy after round ${after} on ${counted(run.judged_rows, "row")}, with 95\u00a0% intervals of the rows alone.${kept}`;
  if (!full || !plug) return basis;
  if (plug.low > full.high) return `The plug-in is better than the untouched model by ${points(plug.accuracy - full.accuracy)}, and the intervals do not meet. ${basis}`;
  if (plug.high < full.low) return `The plug-in is worse than the untouched model by ${points(full.accuracy - plug.accuracy)}, and the intervals do not meet. ${basis}`;
  return `The intervals of plug-in and untouched model overlap, so neither is shown to be better. ${basis}`;
}

const points = (share) => `${(100 * share).toFixed(1)} points`;

/** Draw what is in `place` again only where `key` has changed. */
function keep(place, key, make) {
  if (place.dataset.key === key && place.firstElementChild) return;
  place.dataset.key = key;
  place.replaceChildren(make());
}

// --- curves --------------------------------------------------------------------------------------------------------

const charts = new Map();

function curves(run, isNew) {
  const { closed, judged } = run;
  chart("loss", isNew, {
    data: [closed.number, closed.loss],
    lines: [{ label: "loss", colour: "--accent" }],
    empty: "The curve begins when the first round closes.",
    said: closed.number.length ? `Training loss: ${figure(closed.loss[0])} in round ${closed.number[0]}, ${figure(closed.loss.at(-1))} in round ${closed.number.at(-1)}.` : "",
    write: (value) => figure(value),
  });
  const names = Object.keys(judged.accuracy);
  chart("accuracy", isNew, {
    data: [judged.round, ...names.map((name) => judged.accuracy[name])],
    lines: names.map((name) => ({ label: NAMES[name] ?? name, colour: COLOURS[name] ?? "--third", isDashed: name === "full" })),
    empty: "The hub judges the run at its end; [task] eval_every says how often before that.",
    said: names.map((name) => `${NAMES[name] ?? name}: ${percent(judged.accuracy[name].at(-1) ?? 0)} after round ${judged.round.at(-1)}.`).join(" "),
    write: (value) => (value === null ? "–" : percent(value)),
    axis: (value) => `${Math.round(100 * value)} %`,
  });
  chart("bytes", isNew, {
    data: [closed.number, closed.up, closed.down],
    lines: [{ label: "up", colour: "--accent" }, { label: "down", colour: "--second" }],
    empty: "Counted from the first round on.",
    said: closed.number.length ? `Bytes of round ${closed.number.at(-1)}: ${bytes(closed.up.at(-1))} up, ${bytes(closed.down.at(-1))} down.` : "",
    write: (value) => (value === null ? "–" : bytes(value)),
    axis: bytes,
    isFromZero: true,
  });
}

function chart(id, isNew, what) {
  const place = $(id);
  if (!what.data[0].length) {
    charts.get(id)?.plot.destroy();
    charts.delete(id);
    return keep(place, "empty", () => el("p", { class: "empty" }, what.empty));
  }
  const width = place.clientWidth;
  const there = charts.get(id);
  const shape = `${what.lines.map((line) => line.label).join()} ${width}`;
  if (there && !isNew && there.shape === shape) {
    if (there.last !== JSON.stringify(what.data)) {
      there.last = JSON.stringify(what.data);
      there.what = what;
      there.plot.setData(what.data);
      there.box.setAttribute("aria-label", what.said);
    }
    return undefined;
  }
  there?.plot.destroy();
  delete place.dataset.key;
  const box = el("div", { role: "img", "aria-label": what.said });
  const kept = { what, shape, last: JSON.stringify(what.data), box };
  const legend = what.lines.length > 1 ? el("ul", { class: "legend" }, ...what.lines.map((line) => el("li", {}, el("i", { class: `swatch${line.colour.slice(1)}` }), line.label))) : null;
  place.replaceChildren(box, ...(legend ? [legend] : []));
  kept.plot = new window.uPlot(options(kept, what, width), what.data, box);
  charts.set(id, kept);
  return undefined;
}

function options(kept, what, width) {
  const grid = { stroke: css("--line"), width: 1 };
  const font = "12px system-ui, sans-serif";
  const axis = { stroke: css("--soft"), grid, ticks: { show: false }, font, size: 52, values: what.axis ? (_, ticks) => ticks.map(what.axis) : undefined };
  const whole = (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick : ""));
  return {
    width,
    height: 210,
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 8 } },
    scales: {
      x: { time: false, range: (_, least, most) => (least === most ? [least - 1, most + 1] : [least, most]) },
      y: { range: (_, least, most) => padded(least, most, what.isFromZero) },
    },
    axes: [{ stroke: css("--soft"), grid: { show: false }, ticks: { show: false }, font, size: 30, values: whole, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 10000, 50000] }, axis],
    series: [{}, ...what.lines.map((line) => ({
      label: line.label, stroke: css(line.colour), width: 2, dash: line.isDashed ? [5, 5] : undefined, spanGaps: true,
      points: { show: what.data[0].length <= 40, size: 6, fill: css(line.colour) },
    }))],
    hooks: { setCursor: [(plot) => tip(kept, plot)] },
  };
}

function padded(least, most, isFromZero) {
  if (least === null) return [0, 1];
  const room = (most - least || Math.abs(most) || 1) * 0.12;
  return [isFromZero ? 0 : least - room, most + room];
}

function tip(kept, plot) {
  kept.tip ??= plot.over.appendChild(el("div", { class: "tip", hidden: true }));
  const at = plot.cursor.idx;
  kept.tip.hidden = at === null || at === undefined || plot.cursor.left < 0;
  if (kept.tip.hidden) return;
  const { data, lines, write } = kept.what;
  say(kept.tip, `round ${data[0][at]}: ${lines.map((line, n) => (lines.length > 1 ? `${line.label} ` : "") + write(data[n + 1][at])).join(", ")}`);
  const half = kept.tip.offsetWidth / 2;
  const left = plot.valToPos(data[0][at], "x");
  kept.tip.style.left = `${Math.min(Math.max(left, half), plot.over.clientWidth - half)}px`;
  kept.tip.style.top = `${Math.max(34, plot.valToPos(data[1][at] ?? 0, "y"))}px`;
}

new ResizeObserver(() => shown && !$("page-run").hidden && curves(shown, false)).observe($("page-run"));

// --- alignment and layers ------------------------------------------------------------------------------------------

const STAGES = { pruned: "After pruning", quantized: "As stored", aligned: "Aligned" };

function alignment(run) {
  const stages = Object.keys(STAGES).filter((stage) => stage in run.public_kl);
  const key = JSON.stringify([run.public_kl, run.realignments.length, run.probes.length]);
  if (!stages.length) return keep($("alignment"), "empty", () => el("p", { class: "empty" }, "Measured while the hub prepares the sub-LLM."));
  return keep($("alignment"), key, () => {
    const rows = stages.map((stage) => [STAGES[stage], run.public_kl[stage], stage]);
    for (const one of run.realignments.slice(-3)) rows.push([`Before round ${one.round}`, one.kl_after, "aligned"]);
    const most = Math.max(...rows.map((row) => row[1])) || 1;
    const list = el("ul", { class: "bars" }, ...rows.map(([name, value, stage]) => {
      const bar = el("span");
      bar.style.width = `${Math.max(0, Math.min(100, (100 * value) / most))}%`;
      return el("li", { class: stage }, el("span", {}, name), el("span", { class: "track", "aria-hidden": "true" }, bar), el("b", {}, figure(value)));
    }));
    const probe = run.probes.at(-1);
    const more = [];
    if (run.realignments.length) more.push(`Realigned ${run.realignments.length === 1 ? "once" : `${run.realignments.length} times`}, last before round ${run.realignments.at(-1).round}.`);
    if (probe) more.push(`Measured before round ${probe.round}: KL ${figure(probe.kl)}, cosine of gradients ${figure(probe.cosine)}.`);
    return el("div", {}, list, more.length ? el("p", { class: "hint" }, more.join(" ")) : null);
  });
}

let known = null;
let asking = false;

async function plan(run, isNew) {
  if (run.phase === "preparing") {
    say($("layers-hint"), "");
    return keep($("layers"), "empty", () => el("p", { class: "empty" }, "Chosen while the hub prepares: layers that change little are pruned."));
  }
  if (known === null && !asking) {
    asking = true;
    try {
      known = await hub.layers();
    } catch {
      // asked again with the next event
    }
    asking = false;
    isNew = true;
  }
  if (known && (isNew || !$("layers").querySelector(".layers"))) layers(known);
  return undefined;
}

function layers(found) {
  const adapter = new Set(found.adapter);
  const kept = new Set(found.kept);
  const retained = new Set((found.mapping ?? []).map(([layer]) => layer));
  const fate = (layer) => (adapter.has(layer) ? "adapter" : retained.has(layer) && kept.has(layer) ? "retained" : kept.has(layer) ? "kept" : "removed");
  const words = { removed: "removed from the sub-LLM", kept: "kept, frozen", retained: "kept, stands for a removed group", adapter: "adapter: edges train LoRA here" };
  const all = [...Array(found.num_layers).keys()];
  say($("layers-hint"), `${found.kept.length} of ${counted(found.num_layers, "layer")} are in the sub-LLM; LoRA is trained in ${found.adapter.length}.`);
  const strip = el("ol", { class: "fates", "aria-label": "What became of each layer" }, ...all.map((layer) => el("li", { class: fate(layer), title: `layer ${layer}: ${words[fate(layer)]}` }, String(layer), el("span", { class: "sr" }, ` ${words[fate(layer)]}`))));
  const used = [...new Set(all.map(fate))];
  const keys = el("div", { class: "keys", "aria-hidden": "true" }, ...used.flatMap((name) => [el("ul", { class: "fates" }, el("li", { class: name })), el("span", {}, words[name])]));
  const body = el("div", { class: "layers" });
  if (found.distances.length) {
    const canvas = el("canvas", { role: "img", "aria-label": `Distances between the outputs of ${found.distances.length} layers; groups that were removed are framed.` });
    heat(canvas, found);
    body.append(el("figure", {}, canvas, el("figcaption", {}, "Distance between the outputs of two layers: across the lower one, up the higher one; dark is near. Frames are the groups that were removed.")));
  }
  body.append(el("div", {}, strip, keys));
  $("layers").replaceChildren(body);
  delete $("layers").dataset.key;
}

/** Draw d(l, l + m): l across, l + m up. */
function heat(canvas, found) {
  const size = found.adapter[0] ?? found.distances.length;
  const cell = Math.max(8, Math.floor(640 / Math.max(1, size)));
  canvas.width = canvas.height = size * cell;
  const paint = canvas.getContext("2d");
  const values = found.distances.flat().filter(Number.isFinite);
  const least = Math.min(...values);
  const most = Math.max(...values);
  found.distances.forEach((row, low) =>
    row.forEach((value, at) => {
      const share = most > least ? (value - least) / (most - least) : 0;
      paint.fillStyle = colour(share);
      paint.fillRect(low * cell, (size - 1 - (low + at + 1)) * cell, cell, cell);
    }),
  );
  paint.strokeStyle = css("--second");
  paint.lineWidth = Math.max(2, cell / 8);
  for (const group of found.groups) {
    const high = group.removed.at(-1);
    paint.strokeRect(group.start * cell + 1, (size - 1 - high) * cell + 1, cell - 2, cell - 2);
  }
}

/** A scale that people who do not see red or green can read too: dark blue to light yellow (cividis). */
function colour(share) {
  const stops = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
  const at = Math.min(stops.length - 1.001, Math.max(0, share) * (stops.length - 1));
  const low = Math.floor(at);
  const mixed = stops[low].map((value, n) => Math.round(value + (stops[low + 1][n] - value) * (at - low)));
  return `rgb(${mixed.join()})`;
}
