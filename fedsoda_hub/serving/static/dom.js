// Make elements of texts, never of HTML, and write numbers as people read them.

/** Return the element with this id. */
export const $ = (id) => document.getElementById(id);

/**
 * Make an element.
 * Attributes: `class`, `on` (event to listener), and others as they are called in HTML; null and false leave one out.
 * Children: elements, and texts that stay texts.
 */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Write a text into an element, only where it changes, so that screen readers hear it once. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function bytes(size) {
  if (size < 1000) return `${Math.round(size)} B`;
  for (const [unit, factor] of [["kB", 1e3], ["MB", 1e6], ["GB", 1e9], ["TB", 1e12]]) {
    const value = size / factor;
    if (value < 999.5) return `${value < 99.95 ? value.toFixed(1) : Math.round(value)} ${unit}`;
  }
  return `${(size / 1e15).toFixed(1)} PB`;
}

export function seconds(count) {
  const all = Math.max(0, Math.round(count));
  if (all < 60) return `${all} s`;
  if (all < 3600) return all % 60 && all < 600 ? `${Math.floor(all / 60)} min ${all % 60} s` : `${Math.round(all / 60)} min`;
  const minutes = Math.round(all / 60);
  if (minutes < 48 * 60) return minutes % 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${minutes / 60} h`;
  return `${Math.round(minutes / 1440)} days`;
}

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;
export const number = (value) => value.toLocaleString("en");
export const counted = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
export const figure = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

export function moment(at) {
  return new Date(at * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}
