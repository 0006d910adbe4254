// The page's side of `explore`: it says what was chosen and shows the panels that come back. It loads nothing.

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
  const fields = {
    pair: select(choices.pair.map((text, row) => [row, text])),
    image: make("input", { type: "text", spellcheck: false }),
    caption: make("input", { type: "text" }),
    foil: make("input", { type: "text" }),
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
    make("label", { className: "wide" }, about, fields.pair),
    make("div", { className: "cl-steps" }, step(-1, "◀", "pair before"), step(1, "▶", "next pair")),
    labelled("Image", fields.image, "third"),
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

function render({ model, el }) {
  const { box, fields, about } = controls(model.get("choices"));
  const panels = make("div", { className: "cl-panels" });
  const root = make("div", { className: "clip-lens-explore" }, box, panels);
  let open = false;
  let focused = null;

  const send = (change) => {
    panels.classList.add("busy");
    model.send({ change });
  };

  const draw = () => {
    const { view, html } = model.get("state");
    for (const [name, field] of Object.entries(fields)) if (document.activeElement !== field || field.tagName === "SELECT") field.value = view[name];
    fields.pair.selectedIndex = view.pair;
    about.textContent = `Pair of the batch (${model.get("choices").pairs})${view.typed ? ": other texts were typed, below" : ""}`;
    fields.rows.disabled = ["head", "q", "k", "v", "pattern"].includes(view.kind);
    panels.innerHTML = html;
    panels.classList.remove("busy");
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
  };

  box.addEventListener("change", (event) => {
    const found = Object.entries(fields).find(([, field]) => field === event.target);
    if (found) send(changeOf(found[0], event.target.value));
  });
  box.addEventListener("click", (event) => {
    const by = Number(event.target.dataset.step);
    const pair = model.get("state").view.pair + by;
    if (by && pair >= 0 && pair < model.get("choices").pairs) send({ pair });
  });
  panels.addEventListener("click", (event) => {
    const cell = event.target.closest("button.cl-cell");
    if (cell) {
      focused = { grid: cell.closest("[data-grid]").dataset.grid, set: cell.dataset.set };
      send(JSON.parse(cell.dataset.set));
    }
    if (event.target.closest(".cl-copy")) copy(event.target);
  });
  panels.addEventListener("toggle", (event) => (open = event.target.open), true);
  panels.addEventListener("keydown", (event) => walk(event, panels));
  root.addEventListener("keydown", (event) => event.stopPropagation());

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
