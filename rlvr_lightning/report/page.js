const figures = JSON.parse(document.getElementById("figures").textContent);
const boxes = [...document.querySelectorAll(".chart")];
const config = { responsive: true, displaylogo: false, scrollZoom: false };
for (const box of boxes) {
  const { data, layout } = figures[box.dataset.figure];
  Plotly.newPlot(box, data, layout, config);
}
// a printed page is narrower than a window, and no resize tells
addEventListener("beforeprint", () => boxes.forEach((box) => Plotly.relayout(box, { width: 690, autosize: false })));
addEventListener("afterprint", () => boxes.forEach((box) => Plotly.relayout(box, { width: null, autosize: true })));
