(function () {
  var svg = document.querySelector("svg.parallel"), ranges = {};
  if (!svg) return;
  function y(event) {
    return new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).y;
  }
  function show() {
    var kept = {};
    svg.querySelectorAll(".trial").forEach(function (trial) {
      var ys = trial.dataset.y.split(" ").map(Number);
      var out = Object.keys(ranges).some(function (i) { return ys[i] < ranges[i][0] || ys[i] > ranges[i][1]; });
      trial.classList.toggle("out", out);
      if (!out) kept[trial.dataset.trial] = true;
    });
    document.querySelectorAll("tr[data-trial]").forEach(function (row) {
      row.classList.toggle("out", Object.keys(ranges).length > 0 && !kept[row.dataset.trial]);
    });
  }
  svg.querySelectorAll(".axis").forEach(function (axis, i) {
    var hit = axis.querySelector(".hit"), brush = axis.querySelector(".brush"), start = null;
    function draw(height, top) { brush.setAttribute("height", height); brush.setAttribute("y", top); }
    hit.addEventListener("pointerdown", function (event) {
      start = y(event); delete ranges[i]; draw(0, 0); show(); hit.setPointerCapture(event.pointerId);
    });
    hit.addEventListener("pointermove", function (event) {
      if (start === null) return;
      var low = Math.min(start, y(event)), high = Math.max(start, y(event));
      if (high - low < 4) return;
      ranges[i] = [low, high]; draw(high - low, low); show();
    });
    hit.addEventListener("pointerup", function () { start = null; });
  });
})();
