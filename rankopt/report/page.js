// Sorting, filtering and folding the table of layers. Without scripts all of it is shown, in the model's order.
(() => {
  const table = document.querySelector("table.layers"), tools = document.querySelector(".tools");
  const filter = tools.querySelector("input"), order = tools.querySelector("select"), count = tools.querySelector("output");
  const bodies = [...table.tBodies], rows = [...table.querySelectorAll("tr.layer")], home = rows.map(row => row.parentNode);
  tools.hidden = false;

  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean), key = order.value;
    rows.forEach((row, i) => {
      home[i].append(row);
      row.hidden = !words.every(word => row.dataset.text.includes(word));
    });
    if (key) [...rows].sort((a, b) => b.dataset[key] - a.dataset[key]).forEach(row => bodies[0].append(row));
    table.classList.toggle("flat", Boolean(key || words.length));
    count.value = words.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length} layers` : "";
  };
  const fold = (body, folded) => {
    body.classList.toggle("folded", folded);
    body.querySelector("button").setAttribute("aria-expanded", String(!folded));
  };

  filter.addEventListener("input", show);
  order.addEventListener("change", show);
  table.querySelectorAll("thead [data-key]").forEach(head => head.addEventListener("click", () => {
    order.value = order.value === head.dataset.key ? "" : head.dataset.key;
    show();
  }));
  bodies.filter(body => body.querySelector("button")).forEach(body => {
    fold(body, true);
    body.querySelector("button").addEventListener("click", () => fold(body, !body.classList.contains("folded")));
  });
})();
