// Videos of a row play in step: the longest is the clock, the others follow it, and wait at their ends for its end.
"use strict";
const drift = 0.06; // seconds that a video may be off before it is moved
for (const row of document.querySelectorAll(".step")) {
  const videos = [...row.querySelectorAll("video")];
  const player = row.querySelector(".player");
  if (!videos.length) continue;
  const [button, bar] = player.children;
  const length = (video) => (Number.isFinite(video.duration) ? video.duration : 0);
  const clock = () => videos.reduce((a, b) => (length(b) > length(a) ? b : a));
  const last = (video) => Math.max(0, length(video) - 0.001); // its last frame stays to be seen
  let playing = false;

  const place = (time) => {
    for (const video of videos) video.currentTime = Math.min(time, last(video));
  };
  const follow = () => {
    if (!playing) return;
    const leader = clock();
    if (leader.ended) {
      place(0);
      for (const video of videos) video.play();
    } else if (leader.paused) {
      stop(); // by its own controls
      return;
    }
    for (const video of videos) {
      const want = Math.min(leader.currentTime, last(video));
      if (video !== leader && Math.abs(video.currentTime - want) > drift) video.currentTime = want;
    }
    bar.value = leader.currentTime / (length(leader) || 1);
    requestAnimationFrame(follow);
  };
  const stop = () => {
    playing = false;
    for (const video of videos) video.pause();
    place(clock().currentTime);
    button.textContent = "Play in step";
  };
  const start = async () => {
    button.textContent = "Pause";
    const leader = clock();
    place(leader.ended ? 0 : leader.currentTime);
    await Promise.all(videos.map((video) => video.play().catch(() => {})));
    playing = true;
    follow();
  };
  button.addEventListener("click", () => (playing ? stop() : start()));
  bar.addEventListener("input", () => {
    if (playing) stop();
    place(bar.value * length(clock()));
  });
  for (const video of videos) video.removeAttribute("controls");
  player.hidden = false;
}
