"use strict";
const read = id => JSON.parse(document.getElementById(id).textContent);
const files = read("packed");
const darkened = read("dark");
const dark = matchMedia("(prefers-color-scheme: dark)");
const MOST_ROWS = 500; // of a figure's table; the file has them all
const READABLE = 29; // pixels of a cell that holds a number of 11 pixels' height
const TICK = 15, FEW_TICKS = 16; // pixels that an upright label needs; so many are always shown
const PAPER = {whole: 690, half: 335}; // pixels of a figure on A4 or letter, which no browser tells beforehand
const CUE = "Scroll sideways for more columns \u2192";
let printing = false;

const unpack = id => {
  const bytes = Uint8Array.from(atob(files[id].gz), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
};

// Files to save

document.addEventListener("click", async event => {
  const button = event.target.closest("button[data-file]");
  if (!button) return;
  const {name, type} = files[button.dataset.file];
  const url = URL.createObjectURL(new Blob([await unpack(button.dataset.file).arrayBuffer()], {type}));
  const link = Object.assign(document.createElement("a"), {href: url, download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
});

// The numbers of a figure as a table

const lines = csv => {
  const found = [[]];
  for (const [whole, cell, end] of csv.matchAll(/("(?:[^"]|"")*"|[^,\r\n]*)(,|\r?\n|$)/g)) {
    if (!whole) break;
    found.at(-1).push(cell.startsWith('"') ? cell.slice(1, -1).replaceAll('""', '"') : cell);
    if (end.endsWith("\n")) found.push([]);
  }
  return found.filter(line => line.length);
};

const short = text => {
  const cell = text.replace(/^'(?=[=+\-@\t\r\n])/, ""); // the file says by an apostrophe that this is no formula
  const number = Number(cell);
  if (cell === "" || Number.isNaN(number)) return cell;
  return (Number.isInteger(number) ? cell : String(Number(number.toPrecision(4)))).replaceAll("-", "\u2212");
};

const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

const row = (cells, words, tag) => {
  const line = make("tr");
  cells.forEach((cell, number) => {
    const head = tag === "th" || number === 0;
    const scope = head ? {scope: tag === "th" ? "col" : "row"} : {};
    line.append(make(head ? "th" : "td", short(cell), {...scope, ...(words[number] ? {class: "words"} : {})}));
  });
  return line;
};

const fill = async details => {
  const box = details.querySelector(".scroll");
  if (!details.open || box.firstChild) return;
  const [names, ...body] = lines(await unpack(details.dataset.table).text());
  const words = (names || []).map((_, number) => body.some(line => line[number] && Number.isNaN(Number(line[number]))));
  const table = make("table"), head = make("thead"), rows = make("tbody");
  if (names) head.append(row(JSON.parse(details.dataset.names), words, "th"));
  rows.append(...body.slice(0, MOST_ROWS).map(line => row(line, words, "td")));
  table.append(head, rows);
  table.setAttribute("aria-label", box.getAttribute("aria-label"));
  box.append(table);
  cue(box);
  if (body.length > MOST_ROWS)
    box.after(make("p", `The first ${MOST_ROWS} of ${body.length} rows; the file has all.`, {class: "small"}));
};
for (const details of document.querySelectorAll("details[data-table]"))
  details.addEventListener("toggle", () => fill(details));

// Figures: the colours follow the page, numbers are printed where cells are wide enough to read them

const recoloured = (value, coloured = false) => {
  if (typeof value === "string") return coloured && darkened[value] || value;
  if (Array.isArray(value)) return value.map(entry => recoloured(entry, coloured));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, entry]) => [name, recoloured(entry, name.includes("color"))]));
};

const ground = layout => {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--faint"].map(name => style.getPropertyValue(name).trim());
  const axes = Object.keys(layout).concat("xaxis", "yaxis").filter(name => /^[xy]axis\d*$/.test(name));
  const lined = name => ({gridcolor: line, zerolinecolor: line, linecolor: line, ...layout[name]});
  return {
    ...layout,
    ...Object.fromEntries(axes.map(name => [name, lined(name)])),
    font: {...layout.font, color: ink},
    margin: layout.margin || {t: layout.title?.text ? 60 : 24, r: 16, b: 48, l: 48},
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
  };
};

const isDark = () => dark.matches && !printing;
const recolour = value => (isDark() ? recoloured(value) : value);

// Of the labels below a grid every second, third ... is left out where there is no room for all

const across = layout => Object.keys(layout).filter(name => /^xaxis\d*$/.test(name));
const step = (box, {tickvals, domain: [start, end] = [0, 1]}) =>
  tickvals?.length > FEW_TICKS ? Math.max(1, Math.ceil(TICK * tickvals.length / ((width(box) - 110) * (end - start)))) : 1;
const every = (values, step) => values.filter((_, number) => number % step === 0);
const thinned = (box, layout) => ({
  ...layout,
  ...Object.fromEntries(across(layout).filter(name => step(box, layout[name]) > 1).map(name => {
    const {tickvals, ticktext} = layout[name], kept = step(box, layout[name]);
    return [name, {...layout[name], tickvals: every(tickvals, kept), ticktext: every(ticktext, kept)}];
  })),
});

const width = box => (printing ? PAPER[box.closest("figure").className ? "whole" : "half"] : box.clientWidth);
const isNarrow = (box, columns) => columns > 0 && (width(box) - 110) / columns < READABLE;
const fits = (box, {layout, columns}) =>
  columns > 0 ? [isNarrow(box, columns), ...across(layout).map(name => step(box, layout[name]))].join() : "";

const draw = (box, figure) => {
  const {data, layout, columns} = figure;
  box.narrow = isNarrow(box, columns);
  box.drawn = fits(box, figure);
  const traces = data.map(trace => (box.narrow && trace.texttemplate ? {...trace, texttemplate: ""} : trace));
  const sized = printing ? {width: width(box), autosize: false} : {};
  const shaped = ground(recolour(columns > 0 ? thinned(box, layout) : layout));
  return Plotly.react(box, recolour(traces), {...shaped, ...sized}, {responsive: true, displayModeBar: false});
};

// The picture of the point under the pointer, of figures that carry pictures (scatter_pairs)

const point = (box, {meta}) => {
  if (!meta?.pictures) return;
  const shown = make("img", undefined, {class: "pointed", alt: "", hidden: ""});
  box.append(shown);
  box.on("plotly_hover", ({points: [{customdata, x, xaxis}]}) => {
    const id = (customdata || [])[0];
    shown.hidden = !Object.hasOwn(meta.pictures, id);
    if (shown.hidden) return;
    Object.assign(shown, {src: meta.pictures[id], alt: id});
    const right = xaxis.d2p(x) > box.clientWidth / 2;
    Object.assign(shown.style, {left: right ? "64px" : "auto", right: right ? "auto" : "4px"});
  });
  box.on("plotly_unhover", () => { shown.hidden = true; });
};

const start = async () => {
  document.head.append(make("script", await unpack("plotly").text()));
  const figures = await unpack("figures").json();
  const boxes = Object.keys(figures).map(id => document.getElementById(id));
  const again = () => boxes.forEach(box => draw(box, figures[box.id]));
  const fit = new ResizeObserver(entries => {
    for (const {target} of entries) {
      if (target.drawn !== fits(target, figures[target.id])) draw(target, figures[target.id]);
    }
  });
  for (const box of boxes) {
    await draw(box, figures[box.id]);
    point(box, figures[box.id].layout);
    fit.observe(box);
  }
  dark.addEventListener("change", again);
  const print = on => {
    printing = on;
    again();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
};
if ("DecompressionStream" in self) start();
else {
  const words = "This browser is too old for the figures and files of this page: they need one of 2023 or later.";
  document.querySelector("main").prepend(make("p", words, {class: "warning"}));
}

// Paper can't unfold: what is folded is printed, but for the numbers of figures

const folded = document.querySelectorAll("main details:not([data-table])");
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...folded].filter(details => !details.open);
  opened.forEach(details => { details.open = true; });
});
addEventListener("afterprint", () => opened.forEach(details => { details.open = false; }));

// Tables that go on to the right say so

const cue = box => {
  const more = box.scrollWidth - box.clientWidth - box.scrollLeft > 4;
  box.classList.toggle("more", more);
  if (more && !box.previousElementSibling?.classList.contains("cue"))
    box.before(make("p", CUE, {class: "small cue", "aria-hidden": "true"}));
  const said = box.previousElementSibling;
  if (said?.classList.contains("cue")) said.hidden = box.scrollWidth - box.clientWidth <= 4;
};
const watch = new ResizeObserver(entries => entries.forEach(({target}) => cue(target)));
for (const box of document.querySelectorAll(".scroll")) {
  watch.observe(box);
  box.addEventListener("scroll", () => cue(box), {passive: true});
}

// Contents: folded on narrow screens, the section in view is marked

const contents = document.querySelector(".contents details");
const narrow = matchMedia("(max-width: 1000px)");
const fold = () => { contents.open = !narrow.matches; };
narrow.addEventListener("change", fold);
fold();
const links = new Map([...contents.querySelectorAll("a")].map(link => [link.hash.slice(1), link]));
contents.addEventListener("click", event => {
  if (narrow.matches && event.target.closest("a")) contents.open = false;
});
const mark = () => {
  const heads = [...links.keys()].map(id => document.getElementById(id));
  const passed = heads.filter(head => head.getBoundingClientRect().top < innerHeight / 3);
  const current = (passed.at(-1) || heads[0]).id;
  links.forEach((link, id) => (id === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
};
addEventListener("scroll", mark, {passive: true});
mark();
