"""The studio's theme for light and dark mode; fonts and scripts are all local."""

import gradio as gr

FONT = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"]
ACCENT, FAINT, HELD_OUT = "#6d5ef0", "#a5b4fc", "#f59e0b"  # colours of curves
CURVES = {"each step": FAINT, "smoothed": ACCENT, "held out": HELD_OUT}


def theme() -> gr.themes.Base:
    """The theme: slate and indigo with rounded corners."""
    return gr.themes.Soft(
        primary_hue=gr.themes.colors.indigo,
        secondary_hue=gr.themes.colors.violet,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=FONT,
        font_mono=MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#0b1020",
        body_text_color_subdued="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        color_accent="#5b4ee5",
        block_background_fill="white",
        block_background_fill_dark="#131a2e",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="#232c47",
        block_shadow="0 1px 2px rgb(15 23 42 / 0.04)",
        block_shadow_dark="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_400",
        block_label_border_width="0px",
        block_label_shadow="none",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0px",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_title_text_weight="500",
        input_background_fill="*neutral_50",
        input_background_fill_dark="#0e1527",
        input_border_color="*neutral_200",
        input_border_color_dark="#232c47",
        button_primary_background_fill="#5b4ee5",
        button_primary_background_fill_hover="#4a3dd4",
        button_primary_background_fill_dark="#6d5ef0",
        button_primary_background_fill_hover_dark="#7f72f5",
        button_primary_text_color="white",
        button_secondary_background_fill_dark="#1c2540",
        button_secondary_background_fill_hover_dark="#28345a",
        button_secondary_border_color_dark="#2c3860",
        checkbox_label_background_fill_dark="#1c2540",
        checkbox_label_background_fill_selected="#5b4ee5",
        checkbox_label_background_fill_selected_dark="#5b4ee5",
        checkbox_label_background_fill_hover_dark="#28345a",
        button_large_radius="*radius_lg",
        button_large_text_size="*text_md",
        button_large_padding="0.6rem 1rem",
        slider_color="#6d5ef0",
    )


CSS = """
.gradio-container { width: 100% !important; max-width: 1360px !important;
  margin: 0 auto !important; }
.gradio-container button.lg { white-space: nowrap; }
.gr-group > .styler { background: var(--block-background-fill) !important; }
.grid-wrap.fixed-height { min-height: 0 !important; max-height: none !important; }
.gallery-container:has(> .preview) { min-height: 420px; }
.grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important;
  grid-template-rows: none !important; grid-auto-rows: auto !important; }
.grid-container.pt-6 { padding-top: 1.9rem; }
.block:has(> .html-container > .prose:empty) { display: none; }
.label-wrap > span:first-child { text-align: left; }
.end { align-items: end !important; }
.drop .wrap { min-height: 0 !important; padding-top: 1.6rem !important; flex-wrap: wrap;
  flex-direction: row !important; gap: 0 .45rem; font-size: .9rem !important; }
.drop .icon-wrap { display: none; }
@media (max-width: 480px) { .drop .wrap { padding-top: 2.7rem !important; } }
.head { display: flex; align-items: center; gap: .8rem; padding: .2rem 0 .1rem; }
.head svg { width: 34px; height: 34px; flex: none; }
.head h1 { font-size: 1.25rem; font-weight: 650; margin: 0; letter-spacing: -.01em; }
.head p { margin: 0; color: var(--body-text-color-subdued); font-size: .9rem; }
.empty { display: flex; flex-direction: column; align-items: center; justify-content: center;
  text-align: center; gap: .4rem; min-height: 190px; padding: 1.6rem; border-radius: 14px;
  border: 1.5px dashed var(--border-color-primary); color: var(--body-text-color-subdued); }
.empty b { color: var(--body-text-color); font-size: 1.02rem; }
.empty span { max-width: 34rem; line-height: 1.5;
  color: var(--body-text-color-subdued) !important; }
.stage { display: flex; flex-direction: column; align-items: center; gap: .7rem; }
.stage img { width: min(100%, 384px); border-radius: 14px; display: block; }
.stage p, .run p { margin: 0; color: var(--body-text-color-subdued); font-size: .9rem; }
.bar { width: 100%; height: 7px; border-radius: 99px; background: var(--border-color-primary);
  overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 99px; background: #6d5ef0;
  transition: width .4s ease; }
.run { display: flex; flex-direction: column; gap: .65rem; padding: .3rem 0; }
.run .line { display: flex; flex-wrap: wrap; gap: .4rem .9rem; align-items: baseline; }
.run .line b { font-size: 1.05rem; overflow-wrap: anywhere; }
.state { font-size: .78rem; font-weight: 600; border-radius: 99px; padding: .12rem .6rem;
  background: rgb(100 116 139 / .16); color: var(--body-text-color); }
.state.running, .state.preparing, .state.starting { color: #4338ca;
  background: rgb(99 102 241 / .18); }
.state.finished { background: rgb(16 185 129 / .18); color: #066446; }
.state.failed { background: rgb(239 68 68 / .16); color: #b01212; }
.state.stopped, .state.stopping, .state.queued { color: #7c4a03;
  background: rgb(245 158 11 / .18); }
.dark .state:is(.running, .preparing, .starting) { color: #a5b4fc; }
.dark .state.finished { color: #6ee7b7; }
.dark .state.failed { color: #fca5a5; }
.dark .state:is(.stopped, .stopping, .queued) { color: #fcd34d; }
.trouble { border-left: 3px solid #e02424; padding: .3rem .8rem; overflow-wrap: anywhere;
  color: var(--body-text-color) !important; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0;
  font-size: .9rem; }
.facts dt { color: var(--body-text-color-subdued); margin: 0; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.box-title { display: block; padding: .5rem .8rem 0; }
.box-title i { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem;
  border-radius: 3px; background: var(--colour); }
.conflicts { display: flex; flex-direction: column; gap: .6rem; font-size: .92rem; }
.conflicts p, .conflicts h4 { margin: 0; }
.conflicts > p:first-child { font-size: 1.05rem; font-weight: 600; color: var(--body-text-color); }
.conflicts h4 { margin-top: .6rem; font-size: .95rem; }
.conflicts small { font-weight: 400; color: var(--body-text-color-subdued); }
.conflicts dl { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr;
  gap: .5rem 1rem; margin: 0; align-items: center; }
.conflicts dt { overflow-wrap: anywhere; } .conflicts dd { margin: 0; }
.conflicts dd span { display: flex; align-items: center; gap: .5rem; height: 1.15rem;
  font-size: .8rem; color: var(--body-text-color-subdued); }
.conflicts i { display: inline-block; height: .7rem; border-radius: 3px; }
.conflicts i.before { background: #d9a05b; } .conflicts i.after { background: #6d5ef0; }
.conflicts .key { font-size: .82rem; color: var(--body-text-color-subdued); }
.conflicts .key i { width: .7rem; margin: 0 .3rem 0 .6rem; vertical-align: -1px; }
.conflicts table { border-collapse: separate; border-spacing: 3px; width: auto; }
.conflicts :is(table, tr, th, td) { border: none !important; }
.conflicts th { font-weight: 500; padding: .2rem .5rem; text-align: left; }
.conflicts td { padding: .3rem .6rem; border-radius: 5px; text-align: center; min-width: 3.2rem;
  background: color-mix(in srgb, #e02424 var(--share, 0%), rgb(100 116 139 / .12)); }
.conflicts td:first-child:empty { background: none; }
.conflicts details td { text-align: left; overflow-wrap: anywhere; font-size: .82rem; }
.conflicts summary { cursor: pointer; color: var(--body-text-color-subdued); }
.mono textarea { font-family: var(--font-mono); font-size: .82rem; line-height: 1.5; }
/* Gradio draws a chart in the colours of that moment; these follow the theme. */
:is(#loss, #rate) svg :is(.mark-text text, .role-axis-label text) {
  fill: var(--body-text-color) !important; }
:is(#loss, #rate) svg :is(.role-axis-grid, .role-axis-tick, .role-axis-domain) line {
  stroke: var(--border-color-primary) !important; }
.queue { margin: 0; padding-left: 1.2rem; font-size: .9rem; }
.grid-wrap img, .thumbnail-item img { background: transparent; }
.gradio-container footer :is(button, a, div) { color: var(--body-text-color-subdued) !important;
  opacity: 1; }
.dark #tabs .tab-container button.selected { color: #a5b4fc; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container main { padding: .3rem !important; }
  #tabs .tab-container button { padding-inline: .5rem; font-size: .88rem; }
  .head p, footer .divider { display: none; }
  .grid-container { --grid-cols: 3 !important; }
  #made .grid-container, #sides .grid-container, #cards .grid-container {
    --grid-cols: 2 !important; }
}
"""

HEAD = """
<div class="head">
<svg viewBox="0 0 32 32" aria-hidden="true"><rect width="32" height="32" rx="9" fill="#5b4ee5"/>
<circle cx="13" cy="13" r="6.5" fill="#fff" fill-opacity=".92"/>
<circle cx="20" cy="20" r="6.5" fill="#c4b5fd" fill-opacity=".85"/></svg>
<div><h1>rite studio</h1><p>Teach a model your own concepts, draw them, put them together.</p></div>
</div>
"""
