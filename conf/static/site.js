// The way to the other language keeps the place on the page, and the choice holds for the root page.
for (const link of document.querySelectorAll("a.language-switch"))
  link.addEventListener("click", () => {
    try {
      localStorage.setItem("language", link.hreflang);
    } catch {
      // A browser that keeps nothing asks again the next time.
    }
    link.hash = location.hash;
    if (location.pathname.endsWith("/search.html")) link.search = location.search;
  });
