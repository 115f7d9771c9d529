// Asks the REST API for an archive with this browser's session, and hands it to the browser as a download.
(() => {
  "use strict";

  const notify = (options) => globalThis.Quasar?.Notify?.create({ ...options, attrs: { role: "status" } });

  async function sentenceOf(answer) {
    try {
      return (await answer.json()).detail ?? answer.statusText;
    } catch {
      return answer.statusText;
    }
  }

  globalThis.gloraDownload = async (address, body) => {
    try {
      const answer = await fetch(address, {
        method: body === undefined ? "GET" : "POST",
        headers: body === undefined ? {} : { "Content-Type": "application/json" },
        body: body === undefined ? undefined : JSON.stringify(body),
      });
      if (!answer.ok) throw new Error(await sentenceOf(answer));
      const name = /filename="?([^";]+)"?/.exec(answer.headers.get("Content-Disposition") ?? "")?.[1] ?? "glora.zip";
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await answer.blob());
      link.download = name;
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
      notify({ type: "positive", message: `${name} is downloaded.` });
    } catch (error) {
      notify({ type: "negative", message: error.message, timeout: 10000, multiLine: true });
    }
  };
})();
