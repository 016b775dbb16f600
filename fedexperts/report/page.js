"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const maps = JSON.parse(document.getElementById("maps").textContent);
const coarse = matchMedia("(pointer: coarse)").matches;
const config = {
  responsive: true, displaylogo: false, displayModeBar: coarse ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d"],
  // plotly.js 4 shows a button that uploads the chart to its maker's cloud unless told not to
  showSendToCloud: false, plotlyServerURL: "",
};
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

function themedLayout(layout) {
  const themed = {
    ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: color("text"), size: 13, family: getComputedStyle(document.body).fontFamily },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("line"), activecolor: color("soft") },
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
  return trace;
}

function draw(id, data, layout) {
  // plotly writes into what it is given, and the next theme needs it as it was
  const fresh = structuredClone({ data, layout });
  Plotly.react(document.getElementById(id), fresh.data.map(themedTrace), themedLayout(fresh.layout), config);
}

/** The masks of what a client last worked with by the end of `round`; null before its first. */
function heldAt(client, round) {
  const until = client.holds.filter(([from]) => from <= round);
  return until.length ? until[until.length - 1][1] : null;
}

const holdsExpert = (mask, expert) => {
  const digit = mask[mask.length - 1 - Math.floor(expert / 4)];
  return digit !== undefined && ((parseInt(digit, 16) >> (expert % 4)) & 1) === 1;
};

function mapCounts(map, clients, round) {
  const held = clients.map((client) => heldAt(client, round)).filter((masks) => masks !== null);
  const widest = Math.max(...map.blocks.map((block) => block.experts));
  return {
    clients: held.length,
    z: map.blocks.map((block, row) => Array.from({ length: widest }, (_, expert) =>
      expert < block.experts ? held.filter((masks) => holdsExpert(masks[row], expert)).length : null)),
  };
}

const pick = { run: document.getElementById("map-run"), client: document.getElementById("map-client"), round: document.getElementById("map-round") };
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function fillMapControls() {
  const map = maps[pick.run.value];
  pick.client.replaceChildren(new Option("all clients: how many hold it", ""), ...map.clients.map((client, index) => new Option(client.name, index)));
  pick.round.max = map.rounds.length - 1;
  pick.round.value = pick.round.max;
}

function drawMap() {
  const map = maps[pick.run.value];
  const all = pick.client.value === "";
  const round = map.rounds[pick.round.value];
  const chosen = all ? map.clients : [map.clients[pick.client.value]];
  const counts = mapCounts(map, chosen, round);
  document.getElementById("map-shown").textContent = `round ${round}`;
  pick.round.setAttribute("aria-valuetext", `round ${round}`);
  document.getElementById("map-note").textContent = all
    ? `${counts.clients} of ${map.planned} clients have trained by round ${round}.`
    : counts.clients ? "What this client worked with the last time it trained." : "This client has not trained by this round.";
  const rows = map.blocks.length;
  draw("map", [{
    type: "heatmap", z: counts.z, y: map.blocks.map((block) => escaped(block.label)), zmin: 0, zmax: all ? Math.max(1, map.clients.length) : 1,
    meta: { theme: "heat" }, xgap: 1, ygap: 1, showscale: all, colorbar: { title: { text: "clients" }, thickness: 12 },
    hovertemplate: all ? "%{y}, expert %{x}: held by %{z} clients<extra></extra>" : "%{y}, expert %{x}: %{z}<extra></extra>",
  }], {
    height: 130 + Math.max(rows * 22, 90), margin: { l: 56, r: 16, t: 32, b: 44 },
    xaxis: { title: { text: "expert" }, showgrid: false, zeroline: false, automargin: true },
    yaxis: { type: "category", autorange: "reversed", showgrid: false, automargin: true },
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
  pick.round.addEventListener("input", drawMap);
}
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
