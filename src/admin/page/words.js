// How things are set on the page, and how numbers are put into words. What is shown is set as text, or as a number in
// an attribute of a drawing, never as markup: it may come from a client.
"use strict";

const DAY = 86_400;
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);

function show(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

function mark(id, name, value) {
  const element = byId(id);
  if (element.dataset[name] !== value) element.dataset[name] = value;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function count(value) {
  return isNumber(value) ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : "–";
}

function rate(value) {
  if (!isNumber(value)) return "–";
  return value.toLocaleString("en", { maximumFractionDigits: value > 0 && value < 10 ? 1 : 0 });
}

function plural(value, one, many) {
  return count(value) + " " + (value === 1 ? one : many);
}

function bytes(value) {
  if (!isNumber(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return (unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)) + "\u00a0" + units[unit];
}

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  // Number and unit stay on one line.
  const minutes = Math.round(seconds / 60);
  if (seconds < 1) return "under 1\u00a0s";
  if (seconds < 60 || (seconds < 90 && seconds % 60 !== 0)) return Math.round(seconds) + "\u00a0s";
  if (minutes < 90) return minutes + "\u00a0min";
  if (seconds < 2 * DAY) return Math.floor(minutes / 60) + "\u00a0h " + (minutes % 60) + "\u00a0min";
  if (seconds < 365 * DAY) return Math.round(seconds / DAY) + "\u00a0days";
  return "over a year";
}

function clock(ms) {
  return new Date(ms).toLocaleTimeString("en-GB");
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
