//! Ranks three items of a shop for one user, from an engine file: what examples/c/rank.c does, in Rust.
//!
//! `make -C csrc && rustc examples/rust/rank.rs -L build/c && LD_LIBRARY_PATH=build/c ./rank model.engine`
use std::ffi::{c_char, c_double, c_int, CStr, CString};
use std::ptr::{null, null_mut};

#[repr(C)]
struct Model([u8; 0]);

#[repr(C)]
struct Request([u8; 0]);

#[repr(C)]
struct Text {
    data: *const c_char,
    size: usize,
}

#[repr(C)]
struct Ranking {
    powers: *const c_double,
    factor: *const c_double,
    factor_power: c_double,
}

#[link(name = "lt4rec")]
extern "C" {
    fn lt4rec_open(path: *const c_char, model: *mut *mut Model, message: *mut c_char) -> c_int;
    fn lt4rec_close(model: *mut Model) -> c_int;
    fn lt4rec_find_field(model: *const Model, name: *const c_char, field: *mut i64) -> c_int;
    fn lt4rec_task_name(model: *const Model, task: i64, name: *mut *const c_char) -> c_int;
    fn lt4rec_request_new(model: *const Model, request: *mut *mut Request) -> c_int;
    fn lt4rec_request_free(request: *mut Request) -> c_int;
    fn lt4rec_message(request: *const Request) -> *const c_char;
    fn lt4rec_begin(request: *mut Request, candidates: i64) -> c_int;
    fn lt4rec_set_ints(request: *mut Request, field: i64, values: *const i64, is_valid: *const u8, rows: i64) -> c_int;
    fn lt4rec_set_doubles(request: *mut Request, field: i64, values: *const f64, is_valid: *const u8, rows: i64)
        -> c_int;
    fn lt4rec_set_strings(request: *mut Request, field: i64, values: *const Text, is_valid: *const u8, rows: i64)
        -> c_int;
    fn lt4rec_set_string_bags(
        request: *mut Request, field: i64, values: *const Text, is_valid: *const u8, offsets: *const i64, rows: i64,
    ) -> c_int;
    fn lt4rec_rank(
        request: *mut Request, threads: c_int, ranking: *const Ranking, k: i64, rows: *mut i64, rank_scores: *mut f64,
        scores: *mut f32, count: *mut i64,
    ) -> c_int;
}

/// An engine file that is open. Threads share it, each with an `Ask` of its own.
struct Ranker(*mut Model);

unsafe impl Send for Ranker {}
unsafe impl Sync for Ranker {}

impl Ranker {
    fn open(path: &str) -> Result<Ranker, String> {
        let (path, mut model, mut message) = (CString::new(path).map_err(|e| e.to_string())?, null_mut(), [0; 512]);
        match unsafe { lt4rec_open(path.as_ptr(), &mut model, message.as_mut_ptr()) } {
            0 => Ok(Ranker(model)),
            _ => Err(unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy().into_owned()),
        }
    }

    fn field(&self, name: &str) -> Result<i64, String> {
        let (text, mut field) = (CString::new(name).map_err(|e| e.to_string())?, 0);
        match unsafe { lt4rec_find_field(self.0, text.as_ptr(), &mut field) } {
            0 => Ok(field),
            _ => Err(format!("no column {name}")),
        }
    }

    fn tasks(&self) -> Vec<String> {
        let (mut names, mut name) = (Vec::new(), null());
        while unsafe { lt4rec_task_name(self.0, names.len() as i64, &mut name) } == 0 {
            names.push(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned());
        }
        names
    }
}

impl Drop for Ranker {
    fn drop(&mut self) {
        unsafe { lt4rec_close(self.0) };
    }
}

/// A request; it keeps its memory from one to the next.
struct Ask<'a>(*mut Request, &'a Ranker);

impl<'a> Ask<'a> {
    fn new(ranker: &'a Ranker) -> Ask<'a> {
        let mut request = null_mut();
        assert_eq!(unsafe { lt4rec_request_new(ranker.0, &mut request) }, 0, "out of memory");
        Ask(request, ranker)
    }

    fn check(&self, status: c_int) -> Result<(), String> {
        match status {
            0 => Ok(()),
            _ => Err(unsafe { CStr::from_ptr(lt4rec_message(self.0)) }.to_string_lossy().into_owned()),
        }
    }
}

impl Drop for Ask<'_> {
    fn drop(&mut self) {
        unsafe { lt4rec_request_free(self.0) };
    }
}

fn texts(of: &[&str]) -> Vec<Text> {
    of.iter().map(|text| Text { data: text.as_ptr().cast(), size: text.len() }).collect()
}

fn run(path: &str) -> Result<(), String> {
    let ranker = Ranker::open(path)?;
    let ask = Ask::new(&ranker);
    let (items, prices, has_price) = ([7i64, 9, 11], [3.5f64, 0.0, 120.0], [1u8, 0, 1]);
    let (city, tags, tag_ends) = (texts(&["Köln"]), texts(&["new", "red", "red"]), [0i64, 2, 2, 3]);
    let request = ask.0;
    unsafe {
        ask.check(lt4rec_begin(request, 3))?;
        ask.check(lt4rec_set_ints(request, ask.1.field("item")?, items.as_ptr(), null(), 3))?;
        ask.check(lt4rec_set_doubles(request, ask.1.field("price")?, prices.as_ptr(), has_price.as_ptr(), 3))?;
        ask.check(lt4rec_set_strings(request, ask.1.field("city")?, city.as_ptr(), null(), 1))?;
        let field = ask.1.field("tags")?;
        ask.check(lt4rec_set_string_bags(request, field, tags.as_ptr(), null(), tag_ends.as_ptr(), 3))?;
    }
    let tasks = ranker.tasks();
    let (mut rows, mut rank_scores, mut count) = ([0i64; 2], [0f64; 2], 0i64);
    let mut scores = vec![0f32; 2 * tasks.len()];
    ask.check(unsafe {
        lt4rec_rank(
            request, 1, null(), 2, rows.as_mut_ptr(), rank_scores.as_mut_ptr(), scores.as_mut_ptr(), &mut count,
        )
    })?;
    println!("item rank_score {}", tasks.join(" "));
    for (i, of_tasks) in scores.chunks(tasks.len()).take(count as usize).enumerate() {
        let of_tasks: Vec<String> = of_tasks.iter().map(f32::to_string).collect();
        println!("{} {} {}", items[rows[i] as usize], rank_scores[i], of_tasks.join(" "));
    }
    Ok(())
}

fn main() {
    let path = std::env::args().nth(1).unwrap_or_else(|| {
        eprintln!("usage: rank model.engine");
        std::process::exit(2)
    });
    if let Err(message) = run(&path) {
        eprintln!("{message}");
        std::process::exit(1);
    }
}
