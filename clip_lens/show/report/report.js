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

// Packed files are gzip. They are unpacked in one go, since paper does not wait: what is printed while the page is still
// being drawn must be drawn at once.

const tables = (count, first, group) => {
  const extra = Array.from({length: count}, (_, n) => Math.max(0, Math.floor(n / group) - 1));
  return {extra, base: extra.map((_, n) => extra.slice(0, n).reduce((sum, bits) => sum + (1 << bits), first))};
};
const LENGTH = tables(28, 3, 4), DISTANCE = tables(30, 1, 2);
LENGTH.base.push(258);
LENGTH.extra.push(0);
const ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15]; // RFC 1951, 3.2.7
const FIXED = [...Array(144).fill(8), ...Array(112).fill(9), ...Array(24).fill(7), ...Array(8).fill(8)];

const huffman = lengths => {
  const most = Math.max(...lengths, 1), found = new Uint16Array(1 << most);
  let code = 0;
  for (let size = 1; size <= most; size++, code <<= 1)
    lengths.forEach((length, symbol) => {
      if (length !== size) return;
      let mirrored = 0;
      for (let bit = 0; bit < size; bit++) mirrored |= (code >> bit & 1) << (size - 1 - bit);
      for (let at = mirrored; at < found.length; at += 1 << size) found[at] = symbol << 4 | size;
      code++;
    });
  return {found, most};
};

const inflate = bytes => {
  const out = new Uint8Array(new DataView(bytes.buffer).getUint32(bytes.length - 4, true));
  let at = 10, bits = 0, held = 0, end = 0, last = 0;
  const fill = count => { for (; held < count; held += 8) bits |= bytes[at++] << held; };
  const drop = count => { bits >>>= count; held -= count; };
  const take = count => {
    fill(count);
    const value = bits & (1 << count) - 1;
    drop(count);
    return value;
  };
  const symbol = ({found, most}) => {
    fill(most);
    const entry = found[bits & (1 << most) - 1];
    drop(entry & 15);
    return entry >> 4;
  };
  const lengths = () => {
    const literals = take(5) + 257, distances = take(5) + 1, codes = Array(19).fill(0), read = [];
    for (let count = take(4) + 4, n = 0; n < count; n++) codes[ORDER[n]] = take(3);
    const tree = huffman(codes);
    while (read.length < literals + distances) {
      const next = symbol(tree);
      if (next < 16) read.push(next);
      else if (next === 16) read.push(...Array(3 + take(2)).fill(read.at(-1)));
      else read.push(...Array(next === 17 ? 3 + take(3) : 11 + take(7)).fill(0));
    }
    return [read.slice(0, literals), read.slice(literals)].map(huffman);
  };
  const copied = (literals, distances) => {
    for (let next = symbol(literals); next !== 256; next = symbol(literals)) {
      if (next < 256) { out[end++] = next; continue; }
      const size = LENGTH.base[next - 257] + take(LENGTH.extra[next - 257]), far = symbol(distances);
      const back = DISTANCE.base[far] + take(DISTANCE.extra[far]);
      for (const stop = end + size; end < stop; end++) out[end] = out[end - back];
    }
  };
  const stored = () => {
    at -= held >> 3;
    bits = held = 0;
    const size = bytes[at] | bytes[at + 1] << 8;
    out.set(bytes.subarray(at + 4, at + 4 + size), end);
    at += 4 + size;
    end += size;
  };
  while (!last) {
    last = take(1);
    const kind = take(2);
    if (kind === 0) stored();
    else copied(...(kind === 1 ? [FIXED, Array(30).fill(5)].map(huffman) : lengths()));
  }
  return out;
};

const unpack = id => inflate(Uint8Array.from(atob(files[id].gz), letter => letter.charCodeAt(0)));
const textOf = id => new TextDecoder().decode(unpack(id));

// Files to save

document.addEventListener("click", event => {
  const button = event.target.closest("button[data-file]");
  if (!button) return;
  const {name, type} = files[button.dataset.file];
  const url = URL.createObjectURL(new Blob([unpack(button.dataset.file)], {type}));
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

const fill = details => {
  const box = details.querySelector(".scroll");
  if (!details.open || box.firstChild) return;
  const [names, ...body] = lines(textOf(details.dataset.table));
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

// What is in view comes first, one figure at a time, so that the page can be read meanwhile

let figures = null;
const boxes = [...document.querySelectorAll(".plot")];
const prepare = () => {
  if (figures) return;
  document.head.append(make("script", textOf("plotly")));
  figures = JSON.parse(textOf("figures"));
};
const drawn = new Set();
const fit = new ResizeObserver(entries => {
  for (const {target} of entries) {
    if (target.drawn !== fits(target, figures[target.id])) draw(target, figures[target.id]);
  }
});
const show = box => {
  draw(box, figures[box.id]);
  if (drawn.has(box)) return;
  drawn.add(box);
  point(box, figures[box.id].layout);
  fit.observe(box);
};
const start = () => {
  prepare();
  const next = boxes.find(box => !drawn.has(box));
  if (!next) return;
  show(next);
  setTimeout(start);
};
setTimeout(start);
dark.addEventListener("change", () => drawn.forEach(show));
const print = on => {
  printing = on;
  prepare();
  boxes.forEach(show);
};
addEventListener("beforeprint", () => print(true));
addEventListener("afterprint", () => print(false));

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
