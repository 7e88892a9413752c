"use strict";
(() => {
  const root = document.documentElement, $ = (id) => document.getElementById(id);
  const decode = (text) => {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const binary = atob(text), bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return bytes;
  };
  // Whoever prints at once waits for no promise, and browsers unpack in promises alone: hence RFC 1951, of gzip
  // without a name of a file.
  const inflate = (bytes) => {
    const out = new Uint8Array(new DataView(bytes.buffer).getUint32(bytes.length - 4, true));
    let place = 10, held = 0, count = 0, end = 0;
    const fill = (bits) => { while (count < bits) { held |= bytes[place++] << count; count += 8; } };
    const drop = (bits) => { held >>>= bits; count -= bits; };
    const take = (bits) => {
      fill(bits);
      const value = held & ((1 << bits) - 1);
      drop(bits);
      return value;
    };
    // Of each next bits, the symbol they begin with and how many bits it has.
    const codes = (lengths) => {
      const longest = Math.max(...lengths), table = new Uint16Array(1 << longest);
      for (let length = 1, code = 0; length <= longest; length++, code <<= 1) {
        for (let symbol = 0; symbol < lengths.length; symbol++) {
          if (lengths[symbol] !== length) continue;
          let at = 0;
          for (let bit = 0; bit < length; bit++) at |= ((code >> bit) & 1) << (length - 1 - bit);
          for (; at < table.length; at += 1 << length) table[at] = (symbol << 4) | length;
          code++;
        }
      }
      return table;
    };
    const next = (table) => {
      fill(15);
      const entry = table[held & (table.length - 1)];
      drop(entry & 15);
      return entry >> 4;
    };
    const fixed = () => [
      Array.from({ length: 288 }, (_, symbol) => (symbol < 144 ? 8 : symbol < 256 ? 9 : symbol < 280 ? 7 : 8)),
      new Array(30).fill(5),
    ];
    const written = () => {
      const literals = take(5) + 257, distances = take(5) + 1, sizes = new Array(19).fill(0), lengths = [];
      const order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
      for (let left = take(4) + 4, at = 0; at < left; at++) sizes[order[at]] = take(3);
      const table = codes(sizes);
      while (lengths.length < literals + distances) {
        const symbol = next(table);
        if (symbol < 16) lengths.push(symbol);
        else {
          const times = symbol === 16 ? 3 + take(2) : symbol === 17 ? 3 + take(3) : 11 + take(7);
          const value = symbol === 16 ? lengths[lengths.length - 1] : 0;
          for (let each = 0; each < times; each++) lengths.push(value);
        }
      }
      return [lengths.slice(0, literals), lengths.slice(literals)];
    };
    for (let last = 0; !last;) {
      last = take(1);
      const kind = take(2);
      if (kind === 0) {
        place -= count >> 3;
        held = count = 0;
        const size = take(16);
        take(16);
        out.set(bytes.subarray(place, place + size), end);
        place += size;
        end += size;
        continue;
      }
      const [literals, distances] = (kind === 1 ? fixed() : written()).map(codes);
      for (let symbol; (symbol = next(literals)) !== 256;) {
        if (symbol < 256) { out[end++] = symbol; continue; }
        const long = symbol - 257, longer = long < 8 || long === 28 ? 0 : (long >> 2) - 1;
        const size = (long === 28 ? 258 : long < 8 ? long + 3 : ((4 + (long & 3)) << longer) + 3) + take(longer);
        const far = next(distances), farther = far < 4 ? 0 : (far >> 1) - 1;
        const back = (far < 4 ? far + 1 : ((2 + (far & 1)) << farther) + 1) + take(farther);
        for (let each = 0; each < size; each++, end++) out[end] = out[end - back];
      }
    }
    return new TextDecoder().decode(out);
  };
  const unpack = (id) => inflate(decode($(id).textContent));
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
  click("download", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([unpack("data-contents")], { type: "application/json" }));
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
  const shortened = (name) => (name.length > 24 ? name.slice(0, 23) + "…" : name);
  let printed = false;
  const narrow = matchMedia("(max-width: 599px)");
  const draw = (key) => {
    const place = $("chart-" + key), chart = charts[key];
    if (!place || !chart) return;
    const isSmall = narrow.matches && !printed, stacked = isSmall && chart.stacked;
    const { data, layout } = coloured(chart.variants[chosen[key] || 0], getComputedStyle(root));
    for (const [axis, part] of Object.entries(stacked ? stacked.axes : {})) layout[axis] = { ...layout[axis], ...part };
    // Long names would leave no room on a small screen; they are whole in the table.
    if (isSmall && layout.yaxis?.ticktext) layout.yaxis.ticktext = layout.yaxis.ticktext.map(shortened);
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
  const prepare = () => {
    if (Object.keys(charts).length) return;
    Object.assign(charts, JSON.parse(unpack("data-charts")));
    const script = document.createElement("script");
    script.textContent = unpack("data-plotly");
    document.head.append(script);
    for (const select of document.querySelectorAll("select[data-for]")) {
      select.addEventListener("change", () => choose(select.dataset.for, Number(select.value)));
    }
  };
  // One after the other, so that the page shows its text first, and answers in between.
  const begin = async () => {
    const pause = () => new Promise((next) => setTimeout(next));
    await pause();
    prepare();
    for (const place of document.querySelectorAll("[data-chart]")) {
      if (!place.dataset.drawn) draw(place.dataset.chart);
      await pause();
    }
    root.dataset.ready = "yes";
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  narrow.addEventListener("change", again);
  // Paper is white, and as wide as the style sheet says; charts that nobody saw, or that are not drawn yet, are printed.
  let theme;
  const print = (begins) => {
    if (printed === begins) return;
    prepare();
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
