" Not part of infilld: the tests drive it.
" A client of llama.cpp's /infill for Neovim, as small as one can be: it sends what llama.vim sends,
" by curl, and shows the text behind the cursor; <Tab> takes it.
"
" g:infill_url, g:infill_token: where and with what. g:infill_prompt_ms: time for the prompt.

let s:shown = ''
let s:marks = nvim_create_namespace('infill')

function! s:body() abort
  let l:line = getline('.')
  let l:at = col('.') - 1
  return {
    \ 'id_slot': 0,
    \ 'input_prefix': join(getline(max([1, line('.') - 256]), line('.') - 1), "\n") .. "\n",
    \ 'input_suffix': strpart(l:line, l:at) .. "\n"
    \   .. join(getline(line('.') + 1, line('.') + 64), "\n") .. "\n",
    \ 'input_extra': [{'filename': 'other.py', 'text': "SIZE = 3\n", 'time': reltime()}],
    \ 'prompt': strpart(l:line, 0, l:at),
    \ 'n_predict': 128,
    \ 'n_indent': strlen(matchstr(l:line, '^\s*')),
    \ 'stop': [],
    \ 'top_k': 40,
    \ 'top_p': 0.9,
    \ 'samplers': ['top_k', 'top_p', 'infill'],
    \ 'stream': v:false,
    \ 'cache_prompt': v:true,
    \ 't_max_prompt_ms': g:infill_prompt_ms,
    \ 't_max_predict_ms': 250,
    \ 'response_fields': ['content', 'truncated', 'tokens_cached']
    \   + map(['prompt_n', 'prompt_ms', 'prompt_per_token_ms', 'prompt_per_second',
    \          'predicted_n', 'predicted_ms', 'predicted_per_token_ms', 'predicted_per_second'],
    \         {_, name -> 'timings/' .. name}),
    \ }
endfunction

function! s:ask() abort
  call s:hide()
  let l:job = jobstart(['curl', '--silent', '--no-buffer', '--request', 'POST',
    \ '--url', g:infill_url, '--header', 'Content-Type: application/json',
    \ '--header', 'Authorization: Bearer ' .. g:infill_token, '--data', '@-'],
    \ {'stdout_buffered': v:true, 'on_stdout': function('s:show')})
  call chansend(l:job, json_encode(s:body()))
  call chanclose(l:job, 'stdin')
endfunction

function! s:show(job, data, event) abort
  let l:raw = join(a:data, "\n")
  if l:raw !~# '"content"\s*:"'
    return
  endif
  let l:reply = json_decode(l:raw)
  let s:shown = l:reply.content
  let l:lines = split(s:shown, "\n", 1)
  let l:told = printf('  | %d tokens %.1f ms', l:reply['timings/predicted_n'],
    \ l:reply['timings/predicted_ms'])
  call nvim_buf_set_extmark(0, s:marks, line('.') - 1, col('.') - 1, {
    \ 'virt_text': [[l:lines[0], 'Comment'], [l:told, 'NonText']],
    \ 'virt_text_pos': 'overlay',
    \ 'virt_lines': map(l:lines[1:], {_, line -> [[line, 'Comment']]}),
    \ })
endfunction

function! s:hide() abort
  let s:shown = ''
  call nvim_buf_clear_namespace(0, s:marks, 0, -1)
endfunction

function! s:take() abort
  let l:text = s:shown
  call s:hide()
  return l:text ==# '' ? "\<Tab>" : l:text
endfunction

autocmd CursorMovedI * call s:ask()
inoremap <expr> <Tab> <SID>take()
