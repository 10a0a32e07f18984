"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawn = new Map();

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  // The page's own colours and font, as Vega-Lite's configuration.
  function theme() {
    const [text, soft, line, first] = ["text", "soft", "line", "first"].map(colour);
    const series = ["first", "second", "third", "fourth", "fifth"].map(colour);
    return {
      background: null,
      font: "system-ui, sans-serif",
      view: { stroke: null },
      axis: { labelColor: soft, titleColor: text, domainColor: soft, tickColor: soft, gridColor: line, gridOpacity: 0.7,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 },
      axisY: { minExtent: 44 },
      legend: { labelColor: text, titleColor: text, orient: "top", labelFontSize: 12, labelLimit: 240, columns: innerWidth < 600 ? 2 : 0 },
      range: { category: series, ramp: [colour("background-line"), first], heatmap: [colour("background-line"), first] },
      text: { color: text },
      mark: { color: first },
      style: {
        "text-line": { color: text },
        "background-line": { color: colour("background-line"), strokeWidth: 1 },
        heat: { color: colour("second") },
      },
    };
  }

  async function draw(name) {
    const figure = figures[name];
    const place = document.getElementById(`chart-${name}`);
    const spec = { width: "container", autosize: { type: "fit", contains: "padding" }, ...figure.spec };
    const choice = figure.select && document.getElementById(figure.select).value;
    if (figure.variants[choice]) spec.datasets = { ...spec.datasets, ...figure.variants[choice].datasets };
    if (figure.parameter) spec.params = [{ name: figure.parameter, value: choice }];
    drawn.get(name)?.finalize();
    place.hidden = figure.variants[choice]?.empty ?? false;
    if (!place.hidden) drawn.set(name, await vegaEmbed(place, spec, { renderer: "svg", actions: false, config: theme() }));
    caption(name, choice);
    place.dataset.drawn = choice || "yes";
  }

  function caption(name, choice) {
    const variant = figures[name].variants[choice];
    if (variant) document.getElementById(`caption-${name}`).textContent = variant.caption;
  }

  async function choose(name, choice) {
    const figure = figures[name];
    const place = document.getElementById(`chart-${name}`);
    if (!place.dataset.drawn) return;
    // What had nothing to show has no size until it is drawn anew.
    if (place.hidden || figure.variants[choice]?.empty) return draw(name);
    const view = drawn.get(name).view;
    for (const [data, rows] of Object.entries(figure.variants[choice]?.datasets ?? {})) view.data(data, rows);
    if (figure.parameter) view.signal(figure.parameter, choice);
    await view.runAsync();
    caption(name, choice);
    place.dataset.drawn = choice;
  }

  // Plots are drawn when they come near the window, so that the page is there at once.
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      draw(entry.target.dataset.chart);
    }
  }, { rootMargin: "600px" });

  // Paper has no window to come near to.
  addEventListener("beforeprint", () => {
    for (const place of document.querySelectorAll("[data-chart]")) draw(place.dataset.chart);
  });

  // The plots' library takes longest of all: it is run once the page is shown.
  addEventListener("load", () => requestAnimationFrame(() => setTimeout(() => {
    const library = document.createElement("script");
    library.textContent = document.getElementById("plot-library").textContent;
    document.head.append(library);
    for (const place of document.querySelectorAll("[data-chart]")) observer.observe(place);
  })));

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const name of drawn.keys()) draw(name);
  });

  for (const select of document.querySelectorAll("select[id]")) {
    select.addEventListener("change", () => {
      for (const other of document.querySelectorAll(`select[data-same="${select.id}"]`)) other.value = select.value;
      const same = select.dataset.same && document.getElementById(select.dataset.same);
      if (same) {
        same.value = select.value;
        same.dispatchEvent(new Event("change"));
      }
      for (const [name, figure] of Object.entries(figures)) {
        if (figure.select === select.id) choose(name, select.value);
      }
    });
  }

  for (const button of document.querySelectorAll("button[data-layer]")) {
    button.addEventListener("click", () => {
      const select = document.getElementById("layer");
      select.value = button.dataset.layer;
      select.dispatchEvent(new Event("change"));
      document.getElementById("weights").scrollIntoView();
      select.focus({ preventScroll: true });
    });
  }

  // What a cell is sorted by: its data-value, or its text. Cells without a value come last, either way.
  function sortBy(header) {
    const table = header.closest("table");
    const body = table.tBodies[0];
    const descending = header.getAttribute("aria-sort") !== "descending";
    const value = (row) => {
      const cell = row.cells[header.cellIndex];
      const text = cell.dataset.value ?? cell.textContent.trim();
      return header.classList.contains("number") ? (text === "" ? null : Number(text)) : text;
    };
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === null || b === null) return (a === null) - (b === null);
      const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
      return descending ? -order : order;
    });
    body.append(...rows);
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }
  for (const button of document.querySelectorAll("th[aria-sort] > button")) {
    button.addEventListener("click", () => sortBy(button.parentElement));
  }
})();
