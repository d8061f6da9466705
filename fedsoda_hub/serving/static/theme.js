// Set the colours that were chosen before anything is drawn, so that nothing flashes.
"use strict";
try {
  const chosen = localStorage.getItem("fedsoda-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // no storage: as the system
}
