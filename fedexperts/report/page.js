"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const maps = JSON.parse(document.getElementById("maps").textContent);
const coarse = matchMedia("(pointer: coarse)").matches;
const config = {
  responsive: true, displaylogo: false, displayModeBar: coarse ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d"],
  // plotly.js 4 shows a button that uploads the chart to its maker's cloud unless this is off
  showSendToCloud: false, plotlyServerURL: "",
};
const canDraw = typeof Plotly !== "undefined"; // the page may have been taken away from the file that it loads plotly from
const PAPER = 640; // pixels across a printed page
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

function themedLayout(layout) {
  const themed = {
    ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: color("text"), size: 13, family: getComputedStyle(document.body).fontFamily },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("line"), activecolor: color("soft") },
    ...(document.documentElement.classList.contains("printed") ? { width: PAPER } : {}),
    dragmode: coarse ? false : "zoom", hoverlabel: { ...layout.hoverlabel, bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") } },
  };
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    themed[axis] = { ...layout[axis], gridcolor: color("line"), linecolor: color("line"), tickcolor: color("line"), fixedrange: coarse };
  }
  return themed;
}

function themedTrace(trace) {
  const theme = trace.meta && trace.meta.theme;
  if (theme === "ink") return { ...trace, line: { ...trace.line, color: color("text") }, marker: { ...trace.marker, color: color("text") } };
  if (theme === "heat") return { ...trace, colorscale: [[0, color("heat-0")], [1, color("heat-1")]] };
  if (theme === "cells") return { ...trace, colorscale: [[0, color("heat-0")], [1, color("cell")]], textfont: { color: color("text") } };
  if (theme === "shift") return { ...trace, colorscale: [[0, color("less")], [0.5, color("heat-0")], [1, color("heat-1")]] };
  return trace;
}

function draw(id, data, layout) {
  if (!canDraw) return;
  // plotly modifies its arguments, and the next theme needs the original
  const fresh = structuredClone({ data, layout });
  const place = document.getElementById(id);
  Plotly.react(place, fresh.data.map(themedTrace), themedLayout(fresh.layout), config);
  place.querySelectorAll("svg.main-svg").forEach((svg, layer) => { // plotly draws in layers: one stands for all
    svg.setAttribute(layer ? "aria-hidden" : "role", layer ? "true" : "img");
    if (!layer) svg.setAttribute("aria-label", place.dataset.description);
  });
}

/** The masks of the experts that a client was assigned in its last round up to `round`; null before its first. */
function assignedAt(client, round) {
  const until = client.holds.filter(([from]) => from <= round);
  return until.length ? until[until.length - 1][1] : null;
}

const holdsExpert = (mask, expert) => {
  const digit = mask[mask.length - 1 - Math.floor(expert / 4)];
  return digit !== undefined && ((parseInt(digit, 16) >> (expert % 4)) & 1) === 1;
};

const pick = Object.fromEntries(["run", "what", "client", "round"].map((name) => [name, document.getElementById("map-" + name)]));
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function fillMapControls() {
  const map = maps[pick.run.value];
  pick.client.replaceChildren(new Option("all clients", ""), ...map.clients.map((client, index) => new Option(client.name, index)));
  pick.round.max = map.rounds.length - 1;
  pick.round.value = pick.round.max;
  const hasUses = map.clients.some((client) => client.uses.length);
  pick.what.querySelectorAll("[value=used], [value=shifted]").forEach((option) => { option.hidden = option.disabled = !hasUses; });
  if (!hasUses && (pick.what.value === "used" || pick.what.value === "shifted")) pick.what.value = "assigned";
}

const DESCRIPTION = {
  assigned: "Color: number of clients that held the expert in the last round each trained in, up to the chosen round.",
  used: "Color: share of its layer's routed tokens that the expert received in the last round each client trained in, up to the chosen round, in %; mean over clients.",
  trained: "Color: number of client rounds in which the expert was trained, up to the chosen round.",
  moved: "Color: how many more (blue) or fewer (orange) clients hold the expert than in the first round each trained in.",
  shifted: "Color: how much more (blue) or less (orange) of its layer's routed tokens the expert receives than in the first round each client trained in, in percentage points; mean over clients.",
};
const UNIT = {
  assigned: "clients", used: "% of the layer's routed tokens", trained: "client rounds", moved: "clients, more or fewer",
  shifted: "percentage points, more or less",
};
const BOTH_WAYS = ["moved", "shifted"];

/** For each layer and expert the sum of the weights of the `sets` of masks that contain it. */
function sums(map, sets) {
  const widest = Math.max(...map.blocks.map((block) => block.experts));
  return map.blocks.map((block, row) => Array.from({ length: widest }, (_, expert) => expert >= block.experts ? null
    : sets.reduce((sum, [masks, weight]) => sum + (holdsExpert(masks[row], expert) ? weight : 0), 0)));
}

/** Masks and their weights for `sums`, of one client up to `round`. */
function setsOf(client, what, round) {
  if (what === "trained") return client.trained.filter(([at]) => at <= round).map(([at, masks]) => [masks ?? assignedAt(client, at), 1]);
  const assigned = assignedAt(client, round);
  if (assigned === null) return [];
  return what === "assigned" ? [[assigned, 1]] : [[assigned, 1], [client.holds[0][1], -1]];
}

/** Experts' shares of routed tokens in the last round up to `round`, in % of their layer, as the mean over those of the `clients`
 * that have them; with `shifted`, their difference from the first round. */
function usesOf(map, clients, round, shifted) {
  const recorded = clients.map((client) => client.uses.filter(([at]) => at <= round)).filter((rounds) => rounds.length);
  const share = (rounds, row, expert) => rounds.at(-1)[1][row][expert] - (shifted ? rounds[0][1][row][expert] : 0);
  const widest = Math.max(...map.blocks.map((block) => block.experts));
  return map.blocks.map((block, row) => Array.from({ length: widest }, (_, expert) => expert >= block.experts || !recorded.length ? null
    : Math.round(recorded.reduce((sum, rounds) => sum + share(rounds, row, expert), 0) / recorded.length) / 10));
}

/** The numbers of the map for the `clients`. */
const shownOf = (map, clients, what, round) => what === "used" || what === "shifted" ? usesOf(map, clients, round, what === "shifted")
  : sums(map, clients.flatMap((client) => setsOf(client, what, round)));

/** The end of a color scale: large enough for the whole run, so that rounds can be compared. */
function largest(map, clients, what) {
  if (what === "assigned") return Math.max(1, clients.length);
  const every = map.rounds.flatMap((round) => what !== "trained" || round === map.rounds[map.rounds.length - 1] ? [round] : []);
  return Math.max(1, ...every.map((round) => Math.max(...shownOf(map, clients, what, round).flat().map(Math.abs))));
}

function drawMap() {
  const map = maps[pick.run.value];
  const what = pick.what.value;
  const all = pick.client.value === "";
  const round = map.rounds[pick.round.value];
  const chosen = all ? map.clients : [map.clients[pick.client.value]];
  const z = shownOf(map, chosen, what, round);
  const present = chosen.filter((client) => assignedAt(client, round) !== null).length;
  document.getElementById("map-shown").textContent = `round ${round}`;
  pick.round.setAttribute("aria-valuetext", `round ${round}`);
  document.getElementById("map-description").textContent = DESCRIPTION[what];
  document.getElementById("map-note").textContent = all
    ? `${present} of ${map.planned} clients have trained by round ${round}.`
    : present ? "" : "This client has not trained by this round.";
  const client = all ? "all clients" : chosen[0].name;
  document.getElementById("map").dataset.description =
    `Experts × layers of ${map.run}, ${client}, round ${round}. ${DESCRIPTION[what]} The numbers are in the table below.`;
  fillMapNumbers(map, z);
  const most = largest(map, chosen, what);
  draw("map", [{
    type: "heatmap", z, y: map.blocks.map((block) => escaped(block.label)), zmin: BOTH_WAYS.includes(what) ? -most : 0, zmax: most,
    meta: { theme: BOTH_WAYS.includes(what) ? "shift" : "heat" }, xgap: 1, ygap: 1, showscale: all || (what !== "assigned" && what !== "moved"),
    colorbar: { title: { text: UNIT[what], side: "right" }, thickness: 12, ...(most < 6 ? { dtick: 1 } : {}) },
    hovertemplate: `%{y}, expert %{x}: %{z} ${UNIT[what]}<extra></extra>`,
  }], {
    height: 182 + Math.max(map.blocks.length * 22, 110), margin: { l: 56, r: 16, t: 40, b: 44 }, // the toolbar is above the map
    xaxis: { title: { text: "expert" }, showgrid: false, zeroline: false, automargin: true },
    yaxis: { type: "category", autorange: "reversed", showgrid: false, automargin: true },
  });
}

function cell(kind, text, scope, name) {
  const element = document.createElement(kind);
  element.textContent = text;
  if (scope) element.scope = scope;
  if (name) element.className = name;
  return element;
}

function fillMapNumbers(map, z) {
  const heads = document.createElement("tr");
  heads.append(cell("th", "layer", "col", "text"), ...z[0].map((_, expert) => cell("th", expert, "col")));
  const rows = z.map((numbers, row) => {
    const line = document.createElement("tr");
    line.append(cell("th", map.blocks[row].label, "row"), ...numbers.map((number) => cell("td", number === null ? "–" : number)));
    return line;
  });
  const table = document.getElementById("map-numbers");
  const caption = cell("caption", document.getElementById("map").dataset.description.split(". ")[0]);
  const [head, body] = [document.createElement("thead"), document.createElement("tbody")];
  head.append(heads);
  body.append(...rows);
  table.replaceChildren(caption, head, body);
}

/** Compares numbers as numbers and other cells as text; cells without a number come last in both directions. */
function compare(one, other, column, turn) {
  const [a, b] = [one, other].map((row) => row.cells[column]);
  if (a.classList.contains("text") || a.tagName === "TH") return turn * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
  const [x, y] = [a, b].map((each) => parseFloat(each.textContent.replaceAll(",", "")));
  return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : turn * (x - y);
}

/** Makes each head a button: ascending, descending, original order. */
function sortable(table) {
  const body = table.tBodies[0];
  const before = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      heads.forEach((each) => each.setAttribute("aria-sort", each === head ? next : "none"));
      const turn = next === "ascending" ? 1 : -1;
      body.replaceChildren(...(next === "none" ? before : before.toSorted((one, other) => compare(one, other, column, turn))));
    });
  });
}

/** Says of each table that is wider than its frame that it scrolls, and on which side there is more. */
function scrollHints() {
  const update = (frame) => {
    const rest = frame.scrollWidth - frame.clientWidth;
    frame.parentElement.classList.toggle("scrolls", rest > 1);
    frame.parentElement.classList.toggle("at-end", frame.scrollLeft >= rest - 1);
  };
  const sizes = new ResizeObserver((entries) => entries.forEach((entry) => update(entry.target.closest(".wide"))));
  document.querySelectorAll(".table > .wide").forEach((frame) => {
    sizes.observe(frame);
    sizes.observe(frame.querySelector("table"));
    frame.addEventListener("scroll", () => update(frame), { passive: true });
  });
}

function drawAll() {
  figures.forEach((figure) => draw(figure.id, figure.data, figure.layout));
  if (maps.length) drawMap();
}

if (maps.length) {
  fillMapControls();
  pick.run.addEventListener("change", () => { fillMapControls(); drawMap(); });
  pick.client.addEventListener("change", drawMap);
  pick.what.addEventListener("change", drawMap);
  pick.round.addEventListener("input", drawMap);
}
drawAll();
if (!canDraw) document.getElementById("no-drawings").hidden = false;
document.querySelectorAll("table:not(.plain)").forEach((table) => { if (table.tBodies[0].rows.length > 1) sortable(table); });
scrollHints();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

/** On paper: light colors, as wide as a page, long tables unfolded. */
function onPaper(printed) {
  document.documentElement.classList.toggle("printed", printed);
  document.querySelectorAll("details.long").forEach((long) => { long.open = printed || long.dataset.opened === "true"; });
  drawAll();
}
document.querySelectorAll("details.long").forEach((long) => long.addEventListener("toggle", () => {
  if (!document.documentElement.classList.contains("printed")) long.dataset.opened = long.open;
}));
addEventListener("beforeprint", () => onPaper(true));
addEventListener("afterprint", () => onPaper(false));
