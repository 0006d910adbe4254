// The page's side of `explore`: it says what was chosen and shows the panels that come back. It loads nothing.

// What another pair brings or gives up.
const OF_A_PAIR = ["caption", "foil", "image", "query", "together"];

function make(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

function labelled(text, control, size = "") {
  return make("label", { className: size }, text, control);
}

function select(options) {
  const node = make("select");
  for (const [value, text] of options) node.append(make("option", { value, textContent: text }));
  return node;
}

function controls(choices) {
  const heads = [];
  for (let layer = 0; layer < choices.layers; layer++)
    for (let head = 0; head < choices.heads; head++) heads.push([`${layer}.${head}`, `${layer}.${head}`]);
  const images = make("datalist", { id: `cl-images-${Math.random().toString(36).slice(2)}` });
  for (const name of choices.image) images.append(make("option", { value: name }));
  const hint = choices.image.length ? "none: the text by itself" : "none known";
  const fields = {
    pair: select(choices.pair.map((text, row) => [row, text])),
    image: make("input", { type: "text", spellcheck: false, placeholder: hint }),
    caption: make("input", { type: "text" }),
    foil: make("input", { type: "text", placeholder: "none: the caption alone" }),
    kind: select(Object.entries(choices.kind)),
    source: select(Object.entries(choices.source)),
    run: select(Object.entries(choices.run)),
    rows: select(Object.entries(choices.rows)),
    at: select(heads),
  };
  fields.image.setAttribute("list", images.id);
  const about = make("span");
  const step = (by, text, name) => {
    const button = make("button", { type: "button", textContent: text, title: name });
    button.setAttribute("aria-label", name);
    button.dataset.step = by;
    return button;
  };
  const box = make(
    "div",
    { className: "cl-controls" },
    ...(choices.pairs ? [
      make("label", { className: "wide" }, about, fields.pair),
      make("div", { className: "cl-steps" }, step(-1, "◀", "pair before"), step(1, "▶", "next pair")),
    ] : []),
    labelled("Image", fields.image, "third image"),
    labelled("Caption", fields.caption, "half"),
    labelled("Foil", fields.foil, "half"),
    labelled("Patch", fields.kind, "third"),
    labelled("with", fields.source),
    labelled("into", fields.run, "third"),
    labelled("Rows", fields.rows),
    labelled("Head (block.head)", fields.at),
    images,
  );
  return { box, fields, about };
}

function changeOf(name, value) {
  if (name === "pair") return { pair: Number(value) };
  if (name === "at") {
    const [layer, head] = value.split(".").map(Number);
    return { layer, head };
  }
  return { [name]: value };
}

// Arrow keys walk over the cells of a grid; the tab key passes from grid to grid.
function walk(event, root) {
  const steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  const cell = event.target.closest("button.cl-cell");
  if (!cell || !(event.key in steps)) return;
  const [across, down] = steps[event.key];
  const rows = lines(cell.closest("[data-grid]"));
  const row = rows.findIndex((line) => line.includes(cell));
  const next = rows[row + down]?.[rows[row].indexOf(cell) + across];
  event.preventDefault();
  event.stopPropagation();
  next?.focus();
}

function lines(grid) {
  const rows = grid.matches("table") ? [...grid.tBodies[0].rows] : [grid];
  return rows.map((row) => [...row.querySelectorAll("button.cl-cell")]);
}

// A picture of the panels as a PNG; what a browser can't draw that way is saved as a page.
async function save(panels, style) {
  const dark = panels.closest('[data-jp-theme-light="false"], .vscode-dark, .theme-dark') !== null;
  const paper = dark ? "#1b1b1b" : "#ffffff";
  const inner = make("div", { className: "clip-lens-explore" }, make("style", { textContent: style }), panels.cloneNode(true));
  for (const node of inner.querySelectorAll(".cl-actions, details, .cl-chip button, .cl-plain")) node.remove();
  for (const node of inner.querySelectorAll(".cl-scroll")) node.style.overflow = "visible";
  const sheet = make("div", {}, inner);
  sheet.dataset.jpThemeLight = String(!dark);
  // What a notebook sets around it is not there in the picture, nor must it be while the picture is measured.
  const clear = "--jp-ui-font-color0:initial;--vscode-editor-foreground:initial;--jp-ui-font-family:initial";
  sheet.style.cssText = `position:absolute;left:-9999px;top:0;width:max-content;min-width:900px;padding:12px;background:${paper};${clear}`;
  panels.append(sheet);
  const [width, height] = [Math.ceil(sheet.scrollWidth), Math.ceil(sheet.scrollHeight)];
  sheet.remove();
  sheet.style.cssText = `box-sizing:border-box;width:${width}px;height:${height}px;padding:12px;background:${paper}`;
  try {
    const frame = make("div", { innerHTML: `<svg width="${width}" height="${height}"><foreignObject width="100%" height="100%" /></svg>` });
    frame.querySelector("foreignObject").append(sheet);
    const drawing = new XMLSerializer().serializeToString(frame.firstChild);
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(drawing)}`;
    await image.decode();
    const canvas = make("canvas", { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
    const made = await new Promise((done, failed) => canvas.toBlob((blob) => (blob ? done(blob) : failed()), "image/png"));
    download(made, "explore.png");
  } catch {
    download(new Blob([`<!doctype html><meta charset="utf-8">${sheet.outerHTML}`], { type: "text/html" }), "explore.html");
  }
}

function download(blob, name) {
  const address = URL.createObjectURL(blob);
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

function render({ model, el }) {
  const { box, fields, about } = controls(model.get("choices"));
  const panels = make("div", { className: "cl-panels" });
  const busy = make("div", { className: "cl-busy" }, make("span", { textContent: "computing" }));
  const root = make("div", { className: "clip-lens-explore" }, box, busy, panels);
  busy.setAttribute("role", "status");
  let open = false;
  let focused = null;
  let asked = null; // what the kernel is computing
  let queued = null; // what was chosen meanwhile: one answer for all of it

  const send = (change) => {
    if (asked) {
      if ("pair" in change) for (const name of OF_A_PAIR) delete queued?.[name];
      queued = { ...queued, ...change };
      return;
    }
    asked = change;
    panels.classList.add("busy");
    root.classList.add("waiting");
    panels.setAttribute("aria-busy", "true");
    model.send({ change });
  };
  // A field as it will be when all that was chosen is answered.
  const wanted = (name) => queued?.[name] ?? asked?.[name] ?? model.get("state").view[name];

  const draw = () => {
    const { view, html, offers } = model.get("state");
    for (const [name, field] of Object.entries(fields)) if (document.activeElement !== field || field.tagName === "SELECT") field.value = view[name];
    fields.pair.selectedIndex = view.pair;
    for (const [name, names] of Object.entries(offers))
      for (const option of fields[name].options) option.disabled = option.hidden = !names.includes(option.value);
    about.textContent = `Pair of the batch (${model.get("choices").pairs})${view.typed ? ": other texts were typed, below" : ""}`;
    panels.innerHTML = html;
    panels.classList.remove("busy");
    root.classList.remove("waiting");
    panels.removeAttribute("aria-busy");
    asked = null;
    panels.querySelector("details")?.toggleAttribute("open", open);
    for (const grid of panels.querySelectorAll("[data-grid]")) {
      const cells = lines(grid).flat();
      if (cells.length && !cells.some((cell) => cell.tabIndex === 0)) cells[0].tabIndex = 0;
    }
    // Jupyter has shortcuts on single keys ("x" cuts a cell), and looks for this mark at whatever has the focus.
    for (const node of root.querySelectorAll("button, input, select, summary")) node.dataset.lmSuppressShortcuts = "true";
    if (focused) {
      const grid = panels.querySelector(`[data-grid="${focused.grid}"]`);
      grid && [...grid.querySelectorAll("button.cl-cell")].find((cell) => cell.dataset.set === focused.set)?.focus();
      focused = null;
    }
    if (queued) {
      const next = queued;
      queued = null;
      send(next);
    }
  };

  box.addEventListener("change", (event) => {
    const found = Object.entries(fields).find(([, field]) => field === event.target);
    if (found) send(changeOf(found[0], event.target.value));
  });
  box.addEventListener("click", (event) => {
    const by = Number(event.target.dataset.step);
    const pair = wanted("pair") + by;
    if (by && pair >= 0 && pair < model.get("choices").pairs) send({ pair });
  });
  panels.addEventListener("click", (event) => {
    const cell = event.target.closest("button.cl-cell");
    if (cell) {
      focused = { grid: cell.closest("[data-grid]").dataset.grid, set: cell.dataset.set };
      send(cell.dataset.site && (event.ctrlKey || event.metaKey) ? toggled(cell.dataset.site) : JSON.parse(cell.dataset.set));
    }
    const setting = event.target.closest(".cl-set");
    if (setting) send(JSON.parse(setting.dataset.set));
    if (event.target.closest(".cl-copy")) copy(event.target);
    if (event.target.closest(".cl-save")) save(panels, model.get("choices").style);
  });
  panels.addEventListener("toggle", (event) => (open = event.target.open), true);
  panels.addEventListener("keydown", (event) => walk(event, panels));
  root.addEventListener("keydown", (event) => event.stopPropagation());

  // The places that are patched together, with this one among them or no longer.
  function toggled(site) {
    const name = ({ kind, layer, unit, slot }) => JSON.stringify([kind, layer, unit, slot]);
    const one = JSON.parse(site);
    const others = wanted("together").filter((other) => name(other) !== name(one));
    return { together: others.length < wanted("together").length ? others : [...others, one] };
  }

  async function copy(button) {
    const text = model.get("state").code;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      const details = panels.querySelector("details");
      details.open = open = true;
      getSelection().selectAllChildren(details.querySelector("code"));
      button.textContent = "Selected below: copy it with Ctrl+C";
    }
  }

  model.on("change:state", draw);
  draw();
  el.append(root);
  return () => model.off("change:state", draw);
}

export default { render };
