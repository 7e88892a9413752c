"use strict";
(() => {
  const root = document.documentElement, $ = (id) => document.getElementById(id);
  const decode = (text) => {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const binary = atob(text), bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return bytes;
  };
  const unpack = async (id) => {
    const bytes = decode($(id).textContent);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const click = (id, act) => { const of = $(id); if (of) { of.hidden = false; of.addEventListener("click", act); } };

  // Tables sort by the column whose name is pressed.
  for (const head of document.querySelectorAll("thead th")) {
    const name = document.createElement("button");
    name.type = "button";
    name.append(...head.childNodes);
    head.append(name);
    name.addEventListener("click", () => {
      const body = head.closest("table").tBodies[0], column = head.cellIndex;
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].textContent, number = (text) => parseFloat(text.replace(/,/g, ""));
      const compare = (a, b) => {
        const x = number(key(a)), y = number(key(b));
        return isNaN(x) || isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
      };
      body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * compare(a, b)));
    });
  }
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = $(button.dataset.copy);
      let done = true;
      try { await navigator.clipboard.writeText(code.textContent); } catch {
        getSelection().selectAllChildren(code);
        done = document.execCommand("copy");
      }
      $("status").textContent = button.textContent = done ? "Copied" : "Press Ctrl+C";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
  click("download", async () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([await unpack("data-contents")], { type: "application/json" }));
    link.download = "moetuner-report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  if (!$("data-charts")) return;
  const charts = {}, chosen = {};
  // Colours are named by the style sheet, so that charts follow the scheme.
  const coloured = (value, style) => {
    if (typeof value === "string") {
      const named = /^var\((--[a-z]+)\)$/.exec(value);
      return named ? style.getPropertyValue(named[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((each) => coloured(each, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each, style)]));
    }
    return value;
  };
  let printed = false;
  const narrow = matchMedia("(max-width: 599px)");
  const draw = (key) => {
    const place = $("chart-" + key), chart = charts[key];
    if (!place || !chart) return;
    const isSmall = narrow.matches && !printed, stacked = isSmall && chart.stacked;
    const { data, layout } = coloured(chart.variants[chosen[key] || 0], getComputedStyle(root));
    for (const [axis, part] of Object.entries(stacked ? stacked.axes : {})) layout[axis] = { ...layout[axis], ...part };
    place.style.height = (stacked || chart).height + "px";
    Plotly.react(place, data, { autosize: true, ...layout, ...(isSmall ? { dragmode: false } : {}) }, {
      responsive: true, displaylogo: false, showSendToCloud: false, displayModeBar: false,
    });
    // Who cannot see the drawing reads its label and the tables.
    for (const drawing of place.children) drawing.setAttribute("aria-hidden", "true");
    if (!place.dataset.drawn && chart.selects.length) {
      place.on("plotly_click", (event) => {
        const point = event.points[0].x;
        for (const other of chart.selects) {
          const names = charts[other] ? charts[other].variants.map((each) => each.name) : [];
          const number = names.findIndex((name) => name.split(" ").slice(0, 2).join(" ") === "layer " + point);
          if (number >= 0) choose(other, number);
        }
      });
    }
    place.dataset.drawn = "yes";
  };
  const choose = (key, number) => {
    chosen[key] = number;
    const select = document.querySelector(`select[data-for="${key}"]`);
    if (select) select.value = String(number);
    draw(key);
  };
  const again = () => { for (const place of document.querySelectorAll("[data-drawn]")) draw(place.dataset.chart); };
  const begin = async () => {
    const [plotly, specs] = await Promise.all([unpack("data-plotly"), unpack("data-charts")]);
    Object.assign(charts, JSON.parse(specs));
    const script = document.createElement("script");
    script.textContent = plotly;
    document.head.append(script);
    for (const select of document.querySelectorAll("select[data-for]")) {
      select.addEventListener("change", () => choose(select.dataset.for, Number(select.value)));
    }
    // One after the other, so that the page answers in between.
    for (const place of document.querySelectorAll("[data-chart]")) {
      draw(place.dataset.chart);
      await new Promise((next) => setTimeout(next));
    }
    root.dataset.ready = "yes";
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  narrow.addEventListener("change", again);
  // Paper is white, and as wide as the style sheet says; charts that nobody saw are printed as well.
  let theme;
  const print = (begins) => {
    if (printed === begins || !Object.keys(charts).length) return;
    if (begins) theme = root.dataset.theme;
    printed = begins;
    root.classList.toggle("printed", begins);
    if (begins || theme) root.dataset.theme = begins ? "light" : theme; else delete root.dataset.theme;
    for (const place of document.querySelectorAll("[data-chart]")) draw(place.dataset.chart);
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  click("theme", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    again();
  });
  begin();
})();
