"use strict";
// Asks for the facts every two seconds. What comes is set as text, never as HTML, and only where it changed.
const place = (name) => document.getElementById(name);
let last = "";

function show(now) {
  place("headline").textContent = now.headline;
  place("headline").parentElement.className = now.tone;
  document.title = `${now.headline} · fedsoda-edge`;
  place("round").hidden = now.progress === null;
  if (now.progress !== null) {
    place("bar").value = now.progress;
    place("percent").textContent = `${Math.round(100 * now.progress)}%`;
  }
  const rows = now.facts.flatMap((fact) => {
    const [about, said] = [document.createElement("dt"), document.createElement("dd")];
    about.textContent = fact.about;
    said.textContent = fact.said;
    if (fact.about === "trouble") about.className = said.className = "trouble";
    return [about, said];
  });
  place("facts").replaceChildren(...rows);
}

async function ask() {
  try {
    const answer = await fetch("/facts.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    const text = await answer.text();
    if (text !== last) show(JSON.parse(text));
    last = text;
  } catch {
    last = "";
    place("headline").textContent = "no answer: fedsoda-edge status --web has ended";
    place("headline").parentElement.className = "trouble";
  }
  setTimeout(ask, 2000);
}

ask();
