"use strict";
// Pictures reach their places, and grow when clicked; a square of a matrix says its numbers.
(() => {
  const { data, byId } = Page;
  const pictures = data.pictures || {};

  for (const image of document.querySelectorAll("img[data-picture]")) {
    const source = Object.hasOwn(pictures, image.dataset.picture) ? pictures[image.dataset.picture] : null;
    if (source) image.src = source;
    else image.closest("button").replaceWith("no file");
  }
  const grids = document.querySelectorAll(".pictures");
  if (grids.length && !document.querySelector(".pictures img")) {
    grids[0].closest("section").querySelector(".words").textContent = "The pictures of this run do not lie beside its result.";
    for (const grid of grids) grid.closest("details").remove();
  }

  const large = byId("enlarged");
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".thumb");
    if (button) {
      const image = button.querySelector("img");
      byId("large").src = image.src;
      byId("large").alt = byId("large-name").textContent = image.alt;
      large.showModal();
    } else if (event.target === large || event.target.closest("#large-close")) large.close();
    const square = event.target.closest(".kin-matrix .cell");
    if (square) {
      document.querySelectorAll(".kin-matrix .chosen").forEach((c) => c.classList.remove("chosen"));
      square.classList.add("chosen");
      byId("square").hidden = false;
      byId("square").textContent = square.querySelector("title").textContent;
    }
  });
})();
