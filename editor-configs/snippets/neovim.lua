-- infilld in Neovim: suggestions as ghost text while you type.
-- Copy to ~/.config/nvim/plugin/infilld.lua. `infilld-lsp` must be on PATH.
--   <Tab>    inserts the suggestion that is shown; without one it is the usual Tab
--   <C-]>    hides it
-- Neovim 0.12 has its own inline completion, which is used there; 0.11 uses what is below.

vim.lsp.config("infilld", {
  cmd = { "infilld-lsp" },
  root_markers = { ".git" },
  capabilities = { textDocument = { inlineCompletion = { dynamicRegistration = false } } },
  -- init_options = { alternatives = 3, automaticDeadlineMs = 1000 },
})
vim.lsp.enable("infilld")

if vim.lsp.inline_completion then
  vim.lsp.inline_completion.enable()
  vim.keymap.set("i", "<Tab>", function()
    if not vim.lsp.inline_completion.get() then
      return "<Tab>"
    end
  end, { expr = true, desc = "infilld: insert the suggestion" })
  return
end

local DEBOUNCE_MS = 150
local METHOD = "textDocument/inlineCompletion"
local namespace = vim.api.nvim_create_namespace("infilld")
local timer = assert(vim.uv.new_timer())
local shown -- { buf, row, col, text }: where the suggestion starts, and all of it
local cancel = function() end

local function hide()
  if shown and vim.api.nvim_buf_is_valid(shown.buf) then
    vim.api.nvim_buf_clear_namespace(shown.buf, namespace, 0, -1)
  end
  shown = nil
end

-- What of the suggestion is not typed yet; nil when the text or the cursor has left it.
local function rest()
  if not shown or shown.buf ~= vim.api.nvim_get_current_buf() then
    return nil
  end
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  if row - 1 ~= shown.row or col < shown.col then
    return nil
  end
  local typed = vim.api.nvim_get_current_line():sub(shown.col + 1, col)
  return vim.startswith(shown.text, typed) and shown.text:sub(#typed + 1) or nil
end

local function show()
  local text = rest()
  if not text or text == "" then
    return hide()
  end
  local lines = vim.split(text, "\n", { plain = true })
  local below = {}
  for i = 2, #lines do
    below[#below + 1] = { { lines[i] == "" and " " or lines[i], "Comment" } }
  end
  local row, col = unpack(vim.api.nvim_win_get_cursor(0))
  vim.api.nvim_buf_set_extmark(shown.buf, namespace, row - 1, col, {
    id = 1,
    virt_text = { { lines[1], "Comment" } },
    virt_text_pos = "inline",
    virt_lines = below,
  })
end

local function request()
  local buf = vim.api.nvim_get_current_buf()
  local client = vim.lsp.get_clients({ bufnr = buf, name = "infilld" })[1]
  if not client or vim.fn.mode() ~= "i" then
    return
  end
  cancel()
  local params = vim.lsp.util.make_position_params(0, client.offset_encoding)
  params.context = { triggerKind = 2 }
  local ok, id = client:request(METHOD, params, function(err, result)
    if err or not result or vim.fn.mode() ~= "i" then
      return -- null: a newer request is under way
    end
    hide()
    local item = result.items[1]
    if not item or vim.api.nvim_get_current_buf() ~= buf then
      return
    end
    local start = item.range.start
    local line = vim.api.nvim_buf_get_lines(buf, start.line, start.line + 1, false)[1] or ""
    local col = vim.str_byteindex(line, client.offset_encoding, start.character, false)
    shown = { buf = buf, row = start.line, col = col, text = item.insertText }
    show()
  end, buf)
  cancel = function()
    if ok and id then
      client:cancel_request(id)
    end
    cancel = function() end
  end
end

local function insert()
  local text = rest()
  if not text or text == "" then
    return false
  end
  -- Not at once: an expression mapping must not change the text.
  vim.schedule(function()
    local row, col = unpack(vim.api.nvim_win_get_cursor(0))
    local lines = vim.split(text, "\n", { plain = true })
    hide()
    vim.api.nvim_buf_set_text(0, row - 1, col, row - 1, col, lines)
    local last = #lines[#lines]
    vim.api.nvim_win_set_cursor(0, { row + #lines - 1, #lines == 1 and col + last or last })
  end)
  return true
end

local group = vim.api.nvim_create_augroup("infilld", {})
vim.api.nvim_create_autocmd({ "InsertEnter", "TextChangedI", "CursorMovedI" }, {
  group = group,
  callback = function()
    show()
    timer:start(DEBOUNCE_MS, 0, vim.schedule_wrap(request))
  end,
})
vim.api.nvim_create_autocmd("InsertLeave", {
  group = group,
  callback = function()
    timer:stop()
    cancel()
    hide()
  end,
})
vim.keymap.set("i", "<Tab>", function()
  return insert() and "" or "<Tab>"
end, { expr = true, desc = "infilld: insert the suggestion" })
vim.keymap.set("i", "<C-]>", hide, { desc = "infilld: hide the suggestion" })
